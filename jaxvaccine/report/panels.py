"""The report of a plan's panels: HS (or not refused) before, after and along the attack, FA and over-refusal, over a
setting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from jaxvaccine.experiment.plans import Panel
from jaxvaccine.report import differences, names, plots, results, tables
from jaxvaccine.report.statistics import Estimate, Probability, above, estimate_rows
from jaxvaccine.report.style import Style, styles


class Scores(NamedTuple):
    """Of one point over its runs, in percent; None where it was not scored."""

    aligned: Estimate | None  # HS before the attack
    end: Estimate | None  # HS after it
    along: Estimate | None  # HS averaged over its steps
    no_answer: Estimate | None  # after it
    unread: Estimate | None  # after it; None also where no run has any
    accuracy: Estimate | None  # FA after it
    over_refusal: Estimate | None  # before it
    chance: Probability | None  # of HS > 50 after it; None also of a single run


# {} is HS or not refused, whichever was measured.
HEADINGS = Scores("{} % aligned", "{} % attacked", "{} % along the attack", "no answer % attacked", "unread % attacked",
                  "FA % attacked", "over-refusal % aligned", tables.chance_heading("{}") + " attacked")
LABELS = Scores("{} before the attack (%), lower is better", "{} after the attack (%), lower is better",
                "{} along the attack (%), lower is better", "no answer after the attack (%)",
                "unread after the attack (%)", "FA after the attack (%), higher is better",
                "over-refusal before the attack (%), lower is better", "")
# What a panel draws of them.
DRAWN = ("end", "along", "accuracy")
NOTE = ('"Along the attack", where there is such a column: averaged over the attack\'s steps, which tells defenses '
        "apart that delay it.\n")


def read_scores(table: pd.DataFrame) -> dict[tuple[str, str], Scores]:
    """The scores of every (method, attack) in a table of results."""
    task = names.accuracy(table["measure"].unique())
    harm = names.harm(table["measure"].unique())
    aligned, attacked, hs = results.aligned(table), results.attacked(table), results.along(table, harm)

    def of(rows: pd.DataFrame, measure: str | None) -> Estimate | None:
        return estimate_rows(results.pick(rows, measure=measure), percent=True) if measure else None

    found = {}
    pairs = results.pick(table, stage="attack")[["method", "attack"]].drop_duplicates()
    for method, attack in pairs.itertuples(index=False):
        before = results.pick(aligned, method=method)
        after = results.pick(attacked, method=method, attack=attack)
        # The runs that were attacked, not all that were aligned.
        before = before.merge(after[results.RUN].drop_duplicates(), on=results.RUN)
        along = results.mean_along(results.pick(hs, method=method, attack=attack), percent=True)
        unread = of(after, names.UNREAD)
        found[method, attack] = Scores(
            of(before, harm), of(after, harm), estimate_rows(along, percent=True), of(after, names.NO_ANSWER),
            unread if unread and unread.mean else None, of(after, task), of(before, names.OVER_REFUSAL),
            above(results.pick(after, measure=harm)))
    return found


def panel_report(table: pd.DataFrame, folder: str | Path, panel: Panel, index: int,
                 scores: Mapping[tuple[str, str], Scores] | None = None) -> str:
    """Markdown of a panel: its table, and its figure panel{index}.png (and PDF) in the folder.

    A point without results is a row without numbers, and a gap in the figure.

    scores: by `read_scores` of the table; None reads them.
    """
    scores = read_scores(table) if scores is None else scores
    harm = names.measure(names.harm(table["measure"].unique())).name
    of_point = {name: [scores.get((point.method, point.attack)) for point in curve]
                for name, curve in panel.curves.items()}
    found = [each for row in of_point.values() for each in row if each]
    shown = [field for field in Scores._fields if any(getattr(each, field) for each in found)]
    header = ["method", panel.xlabel, *(getattr(HEADINGS, field).format(harm) for field in shown)]
    rows = [[names.method(name), point.x, *(_text(each, field) for field in shown)]
            for name, curve in panel.curves.items() for point, each in zip(curve, of_point[name], strict=True)]
    if not panel.xlabel:
        header[1] = "variant"
        if len(panel.curves) == 1:
            header, rows = header[1:], [row[1:] for row in rows]
    text = [f"## {panel.title}\n", tables.table(header, rows)]
    if missing := sum(each is None for row in of_point.values() for each in row):
        text.append(f"Missing so far: {missing} of {len(rows)} points.\n")
    name = f"panel{index}.png"
    line = plot(Path(folder) / name, panel, of_point, harm)
    if (Path(folder) / name).exists():
        text.append(f"![{panel.title}]({name})\n")
    return "\n".join([*text, *([line] if line else [])])


def _text(scores: Scores | None, field: str) -> str:
    found = scores and getattr(scores, field)
    return tables.chance(found) if field == "chance" else tables.percent(found)


def is_numeric(panel: Panel) -> bool:
    """Whether the x axis is a number's: a line says that what lies between two points is in between."""
    return bool(panel.xlabel) and all(plots.is_number(point.x) for curve in panel.curves.values() for point in curve)


def plot(path: Path, panel: Panel, found: Mapping[str, Sequence[Scores | None]], harm: str = "HS") -> str:
    """HS, or what `harm` says was measured in its place, at the attack's end and along it, and FA: lines over a number,
    or a dot plot of named points.

    Returns the line that names what was not drawn, since it is the same everywhere; no file if that is all.
    """
    for suffix in (".png", ".pdf"):  # of an earlier report
        path.with_suffix(suffix).unlink(missing_ok=True)
    reasons, shown = {}, []
    for field in DRAWN:
        means = [getattr(each, field).mean for row in found.values() for each in row
                 if each and getattr(each, field)]
        if not means:
            continue
        if why := plots.constant(means):
            reasons[getattr(HEADINGS, field).format(harm).replace(" %", "")] = why
        else:
            shown.append(field)
    if shown:
        looks = styles(panel.curves)
        places = list(dict.fromkeys(point.x for curve in panel.curves.values() for point in curve))
        numeric = is_numeric(panel)
        figure, axes = plots.panels(len(shown)) if numeric else plots.panels(
            len(shown), size=plots.dots_size(len(places), len(panel.curves)), sharey=True)
        for axis, field in zip(axes, shown, strict=True):
            by_curve = {name: {point.x: each and getattr(each, field)
                               for point, each in zip(panel.curves[name], row, strict=True)}
                        for name, row in found.items()}
            (_lines if numeric else _dots)(axis, panel, places, by_curve, looks,
                                          getattr(LABELS, field).format(harm))
        several = any(getattr(each, field) and getattr(each, field).runs > 1
                      for row in found.values() for each in row if each for field in shown)
        plots.legend(figure, axes, (plots.INTERVAL, *([plots.RUN] if several else [])))
        plots.save(figure, path)
    return plots.left_out(reasons)


def _lines(axis, panel: Panel, places: Sequence[str], by_curve: Mapping[str, Mapping[str, Estimate | None]],
           looks: Mapping[str, Style], label: str) -> None:
    plots.number_axis(axis, {float(x): x for x in places}, rate="rate" in panel.xlabel)
    for i, (name, row) in enumerate(by_curve.items()):
        line = sorted(((float(x), each) for x, each in row.items()), key=lambda pair: pair[0])
        plots.curve(axis, *zip(*line, strict=True), looks[name], names.method(name), plots.dodge(i, len(by_curve)))
    plots.describe(axis, xlabel=names.xlabel(panel.xlabel), ylabel=label)
    plots.percent_axis(axis)


def _dots(axis, panel: Panel, places: Sequence[str], by_curve: Mapping[str, Mapping[str, Estimate | None]],
          looks: Mapping[str, Style], label: str) -> None:
    plots.dots(axis, places, {names.method(name): (looks[name], [row.get(x) for x in places])
                              for name, row in by_curve.items()})
    plots.describe(axis, xlabel=label)
    plots.percent_axis(axis, "x")


def panels_report(table: pd.DataFrame, folder: str | Path, title: str, panels: Sequence[Panel],
                  backbones: Sequence[str], seeds: Sequence[int], first: int = 0) -> str:
    """Markdown of all panels, with panel{first}.png, … in the folder.

    title: headline; "" in a report that has its own.
    """
    measures = table["measure"].unique()
    scored = names.measures(name for name in measures if name not in (names.LOSS, names.HS_PLUS))
    pairs = dict.fromkeys((point.method, point.attack) for panel in panels for curve in panel.curves.values()
                          for point in curve)
    scores = read_scores(table)
    return "\n".join([*([f"# {title}\n"] if title else []),
                      *(panel_report(table, folder, panel, first + i, scores) for i, panel in enumerate(panels)),
                      tables.notes(backbones, seeds, names.measure(names.harm(measures)).name),
                      names.notes(scored) + "\n", NOTE, differences.section(table, list(pairs))])


