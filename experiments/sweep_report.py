"""A sweep's report.md: a table of mean ± sd over bases and seeds, HS over attack steps, HS against FA."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import reports
from jaxvaccine import runs

ALIGNED = "aligned"
NAMES = reports.task_names(("harmful_score", "sst2", "over_refusal"))
Cells = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
MARKERS = "osD^vPX*<>"


def folder_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text.strip("/"))


def read_cells(root: Path, bases: Sequence[str], methods: Sequence[str], attacks: Sequence[str]
               ) -> Cells:
    """{(method, attack): its cells, one per base}; those that are not there yet are left out."""
    cells = {}
    for method, attack in itertools.product(methods, attacks):
        paths = [root / folder_name(base) / folder_name(method) / f"{folder_name(attack)}.json" for base in bases]
        found = [runs.read_json(path) for path in paths if path.exists()]
        if found:
            cells[method, attack] = found
    return cells


def scores_at(cells: Sequence[Mapping[str, Any]], step: int, task: str) -> np.ndarray:
    """[bases · seeds] scores in percent after `step` attack steps."""
    return np.array([score for cell in cells for score in cell["scores"][str(step)][task]])


def steps_of(cells: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted(int(step) for step in cells[0]["scores"])


def mean_sd(values: np.ndarray) -> str:
    """"mean ± sd", the sample's standard deviation; the mean alone of a single value."""
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def plot_curves(path: Path, cells: Cells, methods: Sequence[str],
                attacks: Sequence[str]) -> None:
    """A panel per attack: mean HS over attack steps, with a band of ± one sd within 0 to 100."""
    def draw(axis, found, style):
        steps = steps_of(found)
        values = np.stack([scores_at(found, step, "harmful_score") for step in steps])
        mean, sd = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else 0 * values[:, 0]
        axis.plot(steps, mean, **style)
        axis.fill_between(steps, np.clip(mean - sd, 0, 100), np.clip(mean + sd, 0, 100), alpha=0.12,
                          color=style["color"], linewidth=0)
        axis.set(xlabel="attack step", ylabel="HS (%), lower is better", ylim=(-4, 104))

    _panel_per_attack(path, cells, methods, attacks, draw)


def plot_plane(path: Path, cells: Cells, methods: Sequence[str],
               attacks: Sequence[str]) -> None:
    """A panel per attack: mean HS against mean FA, the way that the attack takes; its end has a black edge."""
    def draw(axis, found, style):
        hs, fa = ([scores_at(found, step, task).mean() for step in steps_of(found)]
                  for task in ("harmful_score", "sst2"))
        axis.plot(fa, hs, **style)
        axis.plot(fa[-1], hs[-1], marker=style["marker"], markersize=9, color=style["color"], markeredgecolor="black")
        axis.set(xlabel="FA (%), higher is better", ylabel="HS (%), lower is better", xlim=(-4, 104), ylim=(-4, 104))

    _panel_per_attack(path, cells, methods, attacks, draw)


def _panel_per_attack(path: Path, cells: Cells, methods: Sequence[str], attacks: Sequence[str], draw: Callable) -> None:
    columns = min(2, len(attacks))
    figure, axes = reports.panels(columns, -(-len(attacks) // columns))
    figure.set_figheight(figure.get_figheight() + 0.8)
    for axis in axes[len(attacks):]:
        axis.set_axis_off()
    axes = axes[:len(attacks)]
    for axis, attack in zip(axes, attacks, strict=True):
        for i, method in enumerate(methods):
            if (method, attack) in cells:
                draw(axis, cells[method, attack], {
                    "marker": MARKERS[i % len(MARKERS)], "color": f"C{i}", "label": method, "markersize": 5})
        axis.set(title=attack)
        axis.grid(alpha=0.3)
    labels = {label: handle for axis in axes
              for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=1 + columns)
    figure.savefig(path, dpi=130)


def score_table(root: Path, bases: Sequence[str], methods: Sequence[str], attacks: Sequence[str], cells: Cells) -> str:
    """Markdown: per method the aligned model and every attack's end; mean ± sd over bases and seeds."""
    rows = []
    for method in methods:
        paths = [root / folder_name(base) / folder_name(method) / f"{ALIGNED}.json" for base in bases]
        aligned = [runs.read_json(path) for path in paths if path.exists()]
        if aligned:
            values = {task: np.concatenate([found["scores"][task] for found in aligned]) for task in NAMES}
            rows.append([method, "aligned", *map(mean_sd, values.values()), str(len(values["sst2"]))])
        for attack in attacks:
            if (method, attack) in cells:
                found = cells[method, attack]
                values = [scores_at(found, steps_of(found)[-1], task) for task in NAMES]
                rows.append([method, attack, *map(mean_sd, values), str(len(values[0]))])
    return reports.table(["method", "model", *(f"{name} %" for name in NAMES.values()), "runs"], rows)


def steps_table(cells: Cells) -> str:
    """Markdown: HS along every attack; mean ± sd over bases and seeds."""
    steps = steps_of(next(iter(cells.values())))
    rows = [[method, attack, *(mean_sd(scores_at(found, step, "harmful_score")) for step in steps)]
            for (method, attack), found in cells.items()]
    return reports.table(["method", "attack", *(f"HS % at step {step}" for step in steps)], rows)


def write(root: Path, bases: Sequence[str], methods: Sequence[str], attacks: Sequence[str]) -> str:
    """report.md with its plots; returns its text."""
    cells = read_cells(root, bases, methods, attacks)
    plot_curves(root / "harmful_score.png", cells, methods, attacks)
    plot_plane(root / "plane.png", cells, methods, attacks)
    text = "\n".join([
        "# Sweep\n", score_table(root, bases, methods, attacks, cells),
        f"Mean ± standard deviation over bases ({', '.join(bases)}) and seeds, at the attack's end.\n",
        steps_table(cells),
        "![HS over attack steps](harmful_score.png)\n", "![HS against FA](plane.png)\n",
        "HS: answers to harmful requests that are no refusal (lower is better). FA: correct answers on the user's task "
        "(higher is better). Over-refusal: benign requests refused (lower is better).\n"])
    (root / reports.REPORT).write_text(text, encoding="utf-8")
    return text
