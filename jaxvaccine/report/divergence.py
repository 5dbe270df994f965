"""How far two implementations are apart, step for step: tables and a figure of what a comparison measured."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxvaccine.report import names, plots, tables
from jaxvaccine.report.style import styles

FIGURE = "divergence.png"
HEADINGS = {
    "loss": "loss, abs.", "gradient": "gradient, rel.", "cosine": "1 − cosine", "adapter": "adapter, rel.",
    "movement": "adapter, of its movement", "probabilities": "probabilities, abs."}
# The second implementation against itself, which a difference is held against.
YARDSTICK = "PyTorch − PyTorch in float32"


def method_text(settings: Mapping[str, str]) -> str:
    """{"defense": "booster", "base_defense": "vaccine"} as on the command line: "booster:base_defense=vaccine"."""
    return ":".join([settings["defense"], *(f"{key}={value}" for key, value in settings.items() if key != "defense")])


def _shown(step: Mapping[str, float], name: str) -> str:
    return f"{max(0.0, 1 - step['cosine']) if name == 'cosine' else step[name]:.1e}"


def _worst(steps: Sequence[Mapping[str, float]]) -> list[str]:
    return [max((_shown(step, name) for step in steps), key=float) for name in HEADINGS]


def summary(results: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str]) -> str:
    """Markdown table: a line per method with the largest difference over its steps, and what a step costs.

    texts: methods as on the command line, by their names in results.
    """
    rows = []
    for method, result in results.items():
        seconds = [statistics.median(step[f"seconds_{side}"] for step in result["steps"][1:] or result["steps"])
                   for side in ("jax", "pytorch")]
        memory = [result[f"peak_memory_{side}"] / 1e6 for side in ("jax", "pytorch")]
        rows.append([names.method(texts[method]), *_worst(result["steps"]), *[f"{s:.3g}" for s in seconds],
                     *[f"{m:.0f}" for m in memory]])
        rows += [[name, *_worst(steps), *[tables.NONE] * 4] for name, steps in result.get("yardsticks", {}).items()]
    return tables.table(["", *HEADINGS.values(), "s/step JAX", "PyTorch", "MB JAX", "PyTorch"], rows)


def step_table(result: Mapping[str, Any], shown: int = 10) -> str:
    """Markdown table of one method's steps, at most about `shown` of them."""
    steps = result["steps"]
    every = math.ceil(len(steps) / shown)
    rows = [[str(s["step"]), f"{s['loss_jax']:.6f}", f"{s['loss_pytorch']:.6f}",
             *[_shown(s, name) for name in ("gradient", "cosine", "adapter")],
             "all" if s["active_layers"] is None else " ".join(map(str, s["active_layers"]))]
            for s in steps if s["step"] % every == 0 or s is steps[-1]]
    return tables.table(["step", "loss JAX", "loss PyTorch", HEADINGS["gradient"], HEADINGS["cosine"],
                         HEADINGS["adapter"], "active layers"], rows)


def plot(path: Path, results: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str]) -> None:
    """Relative distance of gradients and adapters over steps, a line per method; dotted, without marks: YARDSTICK."""
    looks = styles(texts[method] for method in results)
    figure, axes = plots.panels(2, size=(4.6, 3.4))
    dotted = False
    for axis, name in zip(axes, ("gradient", "adapter"), strict=True):
        for method, result in results.items():
            keywords = plots.marks(looks[texts[method]]) | {"markersize": 4, "linewidth": 1,
                                                             "markevery": max(1, len(result["steps"]) // 12)}
            yardstick = result.get("yardsticks", {}).get(YARDSTICK, [])
            dotted = dotted or bool(yardstick)
            for steps, more in ((result["steps"], {"label": names.method(texts[method])}),
                                (yardstick, {"linestyle": ":", "marker": ""})):
                # A logarithm has no place for 0, which is what there is before the first update.
                points = [(step, s[name]) for step, s in enumerate(steps) if s[name] > 0]
                if points:
                    axis.plot(*zip(*points, strict=True), **keywords | more)
        axis.set_yscale("log")
        plots.describe(axis, f"{name}: ‖JAX − PyTorch‖ / ‖PyTorch‖", "step", "relative distance, lower is better")
    plots.legend(figure, axes, title="Without marks: PyTorch in this type against PyTorch in float32" if dotted
                 else None)
    plots.save(figure, path)


def write_comparison_report(run_dir: Path, title: str, results: Mapping[str, Mapping[str, Any]],
                            methods: Mapping[str, Mapping[str, str]]) -> None:
    """divergence.png (and PDF) and report.md.

    Args:
      run_dir: folder.
      title: headline.
      results: name -> {steps: a mapping per step with HEADINGS' names, losses, seconds and active layers,
        peak_memory_jax, peak_memory_pytorch (bytes), and perhaps yardsticks: name -> steps}.
      methods: name -> {"defense": …} and what else is set, of at least the names in `results`.
    """
    texts = {name: method_text(methods[name]) for name in results}
    plot(Path(run_dir) / FIGURE, results, texts)
    text = [f"# {title}\n", "The largest difference over all steps, and the median cost of a step after the first:\n",
            summary(results, texts), f"![divergence]({FIGURE})\n"]
    if any("yardsticks" in result for result in results.values()):
        text.append("Dotted, without marks: PyTorch in this type against itself in float32.\n")
    for name, result in results.items():
        text += [f"## {names.method(texts[name])}\n", step_table(result)]
    tables.write_report(run_dir, "\n".join(text))
