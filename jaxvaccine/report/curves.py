"""What is measured inside models while they are aligned and attacked: curves over steps, and tables of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from jaxvaccine.report import names, plots, results, tables
from jaxvaccine.report.statistics import PERCENT_BOUNDS, estimate
from jaxvaccine.report.style import Style, styles


class Curve(NamedTuple):
    """One measure of one method over steps."""

    steps: np.ndarray  # [S]
    values: np.ndarray  # [S, N], a column per run; NaN where a run has no such step


def alignment_curves(table: pd.DataFrame, measure: str) -> dict[str, Curve]:
    """{method: its measure along the alignment}, in the table's order."""
    rows = results.pick(table, stage="alignment", measure=measure)
    rows = rows[rows["layer"].isna()]
    return {method: Curve(*results.run_matrix(results.pick(rows, method=method)))
            for method in rows["method"].unique()}


def attack_curves(table: pd.DataFrame, measure: str, attack: str) -> dict[str, Curve]:
    """{method: its measure along an attack, from the aligned model on}, in the table's order."""
    rows = results.pick(results.along(table, measure), attack=attack)
    order = [method for method in table["method"].unique() if (rows["method"] == method).any()]
    return {method: Curve(*results.run_matrix(results.pick(rows, method=method))) for method in order}


def plot_curves(axis: Axes, curves: Mapping[str, Curve], measure: str, xlabel: str, looks: Mapping[str, Style]) -> None:
    """Means over runs, with a band of ± one standard deviation, and every run as a point."""
    of = names.measure(measure)
    values = np.concatenate([curve.values.ravel() for curve in curves.values()])
    values = values[np.isfinite(values)]
    bounds = PERCENT_BOUNDS if of.unit == names.PERCENT else (-math.inf, math.inf)
    if of.unit != names.PERCENT and len(values):
        if plots.spans_decades(values):
            axis.set_yscale("log")
            bounds = (values.min(), math.inf)
        elif values.min() >= 0:  # so are losses and norms
            bounds = (0, math.inf)
    for i, (method, curve) in enumerate(curves.items()):
        plots.band(axis, curve.steps, curve.values, looks[method], names.method(method),
                   plots.dodge(i, len(curves), 2), bounds)
    plots.describe(axis, xlabel=xlabel, ylabel=of.label)
    if of.unit == names.PERCENT:
        plots.percent_axis(axis)


def plot(path: Path, table: pd.DataFrame, alignment: Sequence[str], attack: str = "", along: Sequence[str] = ()
         ) -> str:
    """A panel per measure: of the alignment, then along one attack.

    Returns the line that names the panels that were not drawn, since nothing changes in them.
    """
    panels = [(measure, "alignment step", alignment_curves(table, measure)) for measure in alignment]
    panels += [(measure, "attack step", attack_curves(table, measure, attack)) for measure in along]
    looks = styles(dict.fromkeys(method for _, _, curves in panels for method in curves))
    shown, reasons = [], {}
    for measure, xlabel, curves in panels:
        of = names.measure(measure)
        means = [mean for curve in curves.values() for mean in np.nanmean(curve.values, axis=1)]
        if not means:
            reasons[of.name] = "there are no values"
        elif why := plots.constant(means, of.unit == names.PERCENT):
            reasons[of.name] = why
        else:
            shown.append((measure, xlabel, curves))
    if shown:
        figure, axes = plots.panels(len(shown), columns=2 if len(shown) in (2, 4) else 3)
        for axis, (measure, xlabel, curves) in zip(axes, shown, strict=True):
            plot_curves(axis, curves, measure, xlabel, looks)
        several = any(curve.values.shape[1] > 1 for _, _, curves in shown for curve in curves.values())
        plots.legend(figure, axes, (plots.SD, plots.RUN) if several else ())
        plots.save(figure, path)
    return plots.left_out(reasons)


def _cell(curve: Curve | None, step: int, measure: str) -> str:
    if curve is None or step not in curve.steps:
        return tables.NONE
    values = curve.values[list(curve.steps).index(step)]
    unit = names.measure(measure).unit
    return tables.quantity(estimate(values[~np.isnan(values)], unit == names.PERCENT), unit, interval=False)


def alignment_table(table: pd.DataFrame, measures: Sequence[str]) -> str:
    """Markdown: every method at the start, the middle and the end of its alignment; mean ± sd over runs."""
    curves = {measure: alignment_curves(table, measure) for measure in measures}
    rows = []
    for method in dict.fromkeys(method for by_method in curves.values() for method in by_method):
        steps = np.unique(np.concatenate([curves[m][method].steps for m in measures if method in curves[m]]))
        rows += [[names.method(method), str(steps[i]),
                  *(_cell(curves[measure].get(method), steps[i], measure) for measure in measures)]
                 for i in sorted({0, len(steps) // 2, len(steps) - 1})]
    return tables.table(["method", "step", *(names.measure(measure).heading for measure in measures)], rows)


def attack_table(table: pd.DataFrame, attack: str, measure: str) -> str:
    """Markdown: one measure along an attack; mean ± sd over runs."""
    curves = attack_curves(table, measure, attack)
    steps = np.unique(np.concatenate([curve.steps for curve in curves.values()])) if curves else []
    return tables.table(["method", *(f"step {step}" for step in steps)],
                        [[names.method(method), *(_cell(curve, step, measure) for step in steps)]
                         for method, curve in curves.items()])


def curves_report(table: pd.DataFrame, folder: str | Path, title: str, alignment: Sequence[str],
                  along: Sequence[str] = (), note: str = "", name: str = "curves") -> str:
    """Markdown of a study's measures, with {name}.png in the folder, and {name}_1.png, … of further attacks.

    Args:
      table: with the measures, along the alignment and, if `along` names any, along attacks.
      folder: where the figures go.
      title: headline.
      alignment: measures taken along the alignment, in the order of panels.
      along: measures taken along every attack.
      note: what the measures are.
      name: of the figures.
    """
    attacks = list(results.pick(table, stage="attack")["attack"].unique()) if along else []
    text = [f"# {title}\n", "## Along the alignment\n", alignment_table(table, alignment)]

    def figure(i: int, attack: str) -> list[str]:
        path = Path(folder) / (f"{name}_{i}.png" if i else f"{name}.png")
        line = plot(path, table, alignment, attack, along if attack else ())
        return [f"![{title}]({path.name})\n", *([line] if line else [])]

    for i, attack in enumerate(attacks):
        text += [f"## Along the attack: {names.attack(attack)}\n",
                 *(f"{names.measure(measure).label}:\n\n{attack_table(table, attack, measure)}" for measure in along),
                 *figure(i, attack)]
    if not attacks:
        text += figure(0, "")
    rows = table[table["stage"] != "backbone"]
    spread = f"Mean ± standard deviation over backbones ({', '.join(rows['backbone'].unique())}) and seeds " \
             f"({', '.join(map(str, rows['seed'].unique()))}). "
    return "\n".join([*text, spread + note + "\n"])
