"""The report of a training run: metrics.png and report.md, from its metrics.jsonl and config.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from jaxvaccine.experiment import runs
from jaxvaccine.report import accounts, names, plots, tables
from jaxvaccine.report.style import METHODS

METRICS, FIGURE = "metrics.jsonl", "metrics.png"
# Of a step's metrics what is plotted, where it is there.
CURVES = tuple(names.STEP_METRICS)


def write_training_report(run_dir: Path, title: str) -> None:
    """metrics.png (and PDF) and report.md of a training run, from its metrics.jsonl and config.json."""
    run_dir = Path(run_dir)
    entries = [json.loads(line) for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines()]
    curves = [name for name in CURVES if name in entries[0]]
    figure, axes = plots.panels(len(curves))
    for axis, name in zip(axes, curves, strict=True):
        values = [entry[name] for entry in entries]
        _draw(axis, [entry["step"] for entry in entries], values)
        if plots.spans_decades(values):
            axis.set_yscale("log")
        plots.describe(axis, xlabel="step", ylabel=names.STEP_METRICS[name].label)
    plots.legend(figure, axes)
    plots.save(figure, run_dir / FIGURE)
    tail = entries[-max(1, len(entries) // 10):]
    rows = [[names.STEP_METRICS[name].name, f"{entries[0][name]:.4g}",
             f"{sum(entry[name] for entry in tail) / len(tail):.4g}"] for name in curves]
    config = runs.read_config(run_dir)
    tokens = sum(entry["tokens"] for entry in entries)
    text = [f"# {title}\n", f"{len(entries)} steps, {tokens:,} tokens read.{_poisoned(config['data'])}\n",
            tables.table(["", "first step", f"mean of the last {len(tail)}"], rows), f"![metrics]({FIGURE})\n"]
    text.append(accounts.section(config["data"].get("accounts", {})))
    tables.write_report(run_dir, "\n".join(part for part in [*text, flag_list(config)] if part))


def _poisoned(of: Mapping[str, Any]) -> str:
    """Of an attack: how many of the examples that were trained on are harmful."""
    if "poison_ratio" not in of:
        return ""
    harmful = round(of["n"] * of["poison_ratio"])
    return f" Trained on {of['n']} examples, {harmful} of them harmful: p = {of['poison_ratio']:g}."


def _draw(axis: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    """Every step, and of a long run a running mean over a twentieth of it, in which a trend shows through the noise."""
    color, length = METHODS["vaccine"].color, len(values) // 20
    axis.plot(steps, values, linewidth=1, color=color, alpha=0.35 if length > 1 else 1, label="every step")
    if length > 1:
        means = np.convolve(values, np.full(length, 1 / length), "valid")
        start = length // 2  # in the middle of what the mean is over
        axis.plot(steps[start:start + len(means)], means, linewidth=1.5, color=color, label=f"mean of {length} steps")


def flag_list(config: Mapping[str, Any]) -> str:
    """Markdown: the flags of a run's config."""
    lines = "\n".join(f"- {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in config["flags"].items())
    return f"## Flags\n\n{lines}\n"
