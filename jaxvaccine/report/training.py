"""The report of a training run: metrics.png and report.md, from its metrics.jsonl and config.json."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from jaxvaccine.experiment import runs
from jaxvaccine.experiment.attack_rows import recorded_accounts
from jaxvaccine.report import accounts, chain, names, plots, tables
from jaxvaccine.report.style import METHODS

METRICS, FIGURE = "metrics.jsonl", "metrics.png"
# Of a step's metrics what is plotted, where it is there.
CURVES = tuple(names.STEP_METRICS)


def write_training_report(run_dir: Path, title: str) -> None:
    """metrics.png (and PDF) and report.md of a training run, from its metrics.jsonl and config.json.

    Metrics that are not there leave gaps, of which the report says how many they are.
    """
    run_dir = Path(run_dir)
    config, entries = runs.read_config(run_dir), _read_metrics(run_dir / METRICS)
    curves = [name for name in CURVES if any(name in entry for entry in entries.values())]
    trained = runs.flag(config, "trains") != "nothing"
    text = [f"# {title}\n", *(_missing(entries, config.get("steps")) if trained else ())]
    if curves:
        text += _curves(run_dir, entries, curves)
    of = config["data"]
    poisoned = _poisoned(of, config["flags"]) if trained else ""
    text += [chain.sentence(of), _weights(config), poisoned, accounts.section(recorded_accounts(run_dir)),
             accounts.overlaps(of.get("shared", {})), flag_list(config)]
    tables.write_report(run_dir, "\n".join(part for part in text if part))


def _weights(config: Mapping[str, Any]) -> str:
    """Of an attack on the weights themselves: what it did to them, and what it left."""
    trains, ablate = runs.flag(config, "trains"), runs.flag(config, "ablate")
    said = {"all": "All weights trained.", "nothing": "Nothing trained."}.get(trains, "")
    if ablate != "none":
        when = f"{ablate} the training" if trains != "nothing" else "and that alone"
        layer = config["ablation"]["layer"]
        said += f" The refusal direction before layer {layer} was projected out of the weights, {when}."
    if trains == "all" or ablate != "none":
        said += " The result is the whole model in model/, a Hugging Face directory."
    return f"{said.strip()}\n" if said else ""


def _poisoned(of: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """Of an attack: how many of the examples that were trained on are harmful."""
    if "poison_ratio" not in of:
        return ""
    n, p, asked = of["n"], of["poison_ratio"], flags["poison_ratio"]
    wanted = "" if abs(p - asked) < 1e-6 else f" Asked for was p = {asked:g}, which is {n * asked:g} of them."
    return f"Trained on {n} examples, {round(n * p)} of them harmful: p = {p:g}.{wanted}\n"


def _read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """{step: its metrics} of the lines that are whole; none if there is no file."""
    entries: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):  # a damaged line is a missing step
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries[entry["step"]] = entry
    return dict(sorted(entries.items()))


def _missing(entries: Mapping[int, Mapping[str, Any]], steps: int | None) -> list[str]:
    """Which of the run's steps have no metrics."""
    steps = max(entries, default=-1) + 1 if steps is None else steps
    absent = dict.fromkeys(step for step in range(steps) if step not in entries)
    if entries and not absent:
        return []
    if not entries:
        return [f"{METRICS} is missing or has no whole line: nothing is known of the run's {steps} steps.\n"]
    starts = [step for step in absent if step - 1 not in absent]
    ends = [step for step in absent if step + 1 not in absent]
    spans = [f"{start}" if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=True)]
    return [f"{METRICS} lacks {len(absent)} of {steps} steps (counted from 0): {', '.join(spans[:10])}"
            f"{', …' if len(spans) > 10 else ''}. What follows is without them.\n"]


def _curves(run_dir: Path, entries: Mapping[int, Mapping[str, Any]], curves: Sequence[str]) -> list[str]:
    """The figure, and the text around it."""
    figure, axes = plots.panels(len(curves))
    rows, tail = [], max(1, len(entries) // 10)
    for axis, name in zip(axes, curves, strict=True):
        values = [entry.get(name, float("nan")) for entry in entries.values()]
        known = [value for value in values if not math.isnan(value)]
        _draw(axis, list(entries), values)
        if plots.spans_decades(known):
            axis.set_yscale("log")
        plots.describe(axis, xlabel="step", ylabel=names.STEP_METRICS[name].label)
        rows.append([names.STEP_METRICS[name].name, f"{known[0]:.4g}", f"{np.mean(known[-tail:]):.4g}"])
    plots.legend(figure, axes)
    plots.save(figure, run_dir / FIGURE)
    tokens = sum(entry.get("tokens", 0) for entry in entries.values())
    return [f"{len(entries)} steps, {tokens:,} tokens read.\n",
            tables.table(["", "first step", f"mean of the last {tail}"], rows), f"![metrics]({FIGURE})\n"]


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
