"""What is measured inside models while they are aligned and attacked: curves over steps, and tables of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from jaxvaccine.report import differences, names, plots, results, tables
from jaxvaccine.report.statistics import PERCENT_BOUNDS, UNBOUNDED, Estimate, above, estimate_steps
from jaxvaccine.report.style import Style, styles

# One measure of one method by step.
Curve = Mapping[int, Estimate]


def alignment_curves(table: pd.DataFrame, measure: str) -> dict[str, Curve]:
    """{method: its measure along the alignment}, in the table's order."""
    rows = results.pick(table, stage="alignment", measure=measure)
    rows = rows[rows["layer"].isna()]
    return {method: _curve(results.pick(rows, method=method)) for method in rows["method"].unique()}


def attack_curves(table: pd.DataFrame, measure: str, attack: str) -> dict[str, Curve]:
    """{method: its measure along an attack, from the aligned model on}, in the table's order."""
    rows = results.pick(results.along(table, measure), attack=attack)
    order = [method for method in table["method"].unique() if (rows["method"] == method).any()]
    return {method: _curve(results.pick(rows, method=method)) for method in order}


def _curve(rows: pd.DataFrame) -> Curve:
    return estimate_steps(rows, names.measure(rows["measure"].iloc[0]).unit == names.PERCENT)


def plot_curves(axis: Axes, curves: Mapping[str, Curve], measure: str, xlabel: str, looks: Mapping[str, Style],
                title: str = "") -> None:
    """Means over runs, with a band of ± one standard deviation, and every run as a point."""
    of = names.measure(measure)
    values = np.concatenate([[], *(each.values for curve in curves.values() for each in curve.values())])
    values = values[np.isfinite(values)]
    bounds = PERCENT_BOUNDS if of.unit == names.PERCENT else UNBOUNDED
    if of.unit != names.PERCENT and len(values):
        if plots.spans_decades(values):
            axis.set_yscale("log")
            bounds = (values.min(), math.inf)
        elif values.min() >= 0:  # so are losses and norms
            bounds = (0, math.inf)
    for i, (method, curve) in enumerate(curves.items()):
        plots.band(axis, curve, looks[method], names.method(method), plots.dodge(i, len(curves), 2), bounds)
    plots.describe(axis, title, xlabel, of.label)
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
        means = [each.mean for curve in curves.values() for each in curve.values()]
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
        several = any(each.runs > 1 for _, _, curves in shown for curve in curves.values()
                      for each in curve.values())
        plots.legend(figure, axes, (plots.SD, plots.RUN) if several else ())
        plots.save(figure, path)
    return plots.left_out(reasons)


def _cell(curve: Curve | None, step: int, measure: str) -> str:
    return tables.quantity(curve.get(step) if curve else None, names.measure(measure).unit, interval=False)


def alignment_table(table: pd.DataFrame, measures: Sequence[str]) -> str:
    """Markdown: every method at the start, the middle and the end of its alignment; mean ± sd over runs."""
    curves = {measure: alignment_curves(table, measure) for measure in measures}
    rows = []
    for method in dict.fromkeys(method for by_method in curves.values() for method in by_method):
        steps = sorted({step for measure in measures for step in curves[measure].get(method, ())})
        rows += [[names.method(method), str(steps[i]),
                  *(_cell(curves[measure].get(method), steps[i], measure) for measure in measures)]
                 for i in sorted({0, len(steps) // 2, len(steps) - 1})]
    return tables.table(["method", "step", *(names.measure(measure).heading for measure in measures)], rows)


def attack_table(table: pd.DataFrame, attack: str, measure: str) -> str:
    """Markdown: one measure along an attack; mean ± sd over runs, and of HS its interval and probability at the end."""
    curves = attack_curves(table, measure, attack)
    steps = sorted({step for curve in curves.values() for step in curve})
    header = ["method", *(f"step {step}" for step in steps)]
    lines = [[names.method(method), *(_cell(curve, step, measure) for step in steps)]
             for method, curve in curves.items()]
    if measure == names.harm([measure]):
        ends = results.pick(results.attacked(table), attack=attack, measure=measure)
        chances = [above(results.pick(ends, method=method)) for method in curves]
        header.append("end (95% interval)")
        for line, method in zip(lines, curves, strict=True):
            line.append(tables.cell(results.pick(ends, method=method), measure))
        if any(chances):
            header.append(tables.chance_heading(names.measure(measure).name))
            for line, chance in zip(lines, chances, strict=True):
                line.append(tables.chance(chance))
    return tables.table(header, lines)


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
    over, harm = [list(rows[column].unique()) for column in results.RUN], names.harm(along)
    if attacks and harm in along:
        text += [tables.notes(*over, names.measure(harm).name), differences.section(table)]
    else:
        text.append(tables.runs_note(*over) + "\n")
    return "\n".join([*text, note + "\n"] if note else text)
