"""A paper's figures beside ours."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import pandas as pd

from jaxvaccine.experiment.plans import Panel, Point
from jaxvaccine.report import names, results, tables
from jaxvaccine.report.statistics import estimate_rows


class Figure(Protocol):
    """A published figure."""

    method: str
    poison_ratio: str
    n: int
    harmful_score: float  # percent
    accuracy: float  # percent
    model: str
    task: str
    source: str


class TableCell(NamedTuple):
    """A cell of a paper's main tables."""

    point: Point
    p: str
    n: int


def table_cells(ratios: Panel, counts: Panel, p: str, n: int) -> list[TableCell]:
    """The cells of both panels. p: of the attacks over n; n: of those over p."""
    over_p = [TableCell(point, point.x, n) for curve in ratios.curves.values() for point in curve]
    over_n = [TableCell(point, p, int(point.x)) for curve in counts.curves.values() for point in curve]
    return over_p + over_n


def comparison(table: pd.DataFrame, cells: Sequence[TableCell], figures: Sequence[Figure]) -> str:
    """Markdown: published, ours, difference and interval, HS and FA of every cell; a cell without results has none.

    Where a judge of phrases judged, ours is not refused: it has a row of its own, and no difference from an HS.
    """
    by_place: Mapping[tuple[str, str, int], Figure] = {(f.method, f.poison_ratio, f.n): f for f in figures}
    attacked, task = results.attacked(table), names.accuracy(table["measure"].unique())
    by_phrases = [names.NOT_REFUSED] if names.harm(table["measure"].unique()) == names.NOT_REFUSED else []
    rows = []
    for point, p, n in cells:
        of = results.pick(attacked, method=point.method, attack=point.attack)
        figure = by_place.get((point.method, p, n))
        for measure in (*by_phrases, names.HS, task):
            name = "FA" if measure == task else names.measure(measure).name
            ours = estimate_rows(results.pick(of, measure=measure), percent=True)
            row = [names.method(point.method), p, str(n), name, "", tables.NONE, "", tables.NONE, ""]
            if ours:
                row[5], row[7] = f"{ours.mean:.2f}", f"{ours.low:.1f}–{ours.high:.1f}"
            if figure and measure not in by_phrases:
                number = figure.harmful_score if measure == names.HS else figure.accuracy
                row[4], row[8] = f"{number:.2f}", f"{figure.source}: {figure.model}, {figure.task}"
                row[6] = f"{ours.mean - number:+.2f}" if ours else ""
            rows.append(row)
    return tables.table(["method", "p", "n", "%", "published", "ours", "difference", "95% interval of ours", "source"],
                        rows)


def largest_drop(table: pd.DataFrame, cells: Sequence[TableCell], method: str) -> str:
    """By how much a method's HS is lower than another's at the same p and n, at most; "–" without such a pair."""
    attacked = results.pick(results.attacked(table), measure=names.HS)
    hs = {(cell.point.method, cell.p, cell.n): found.mean for cell in cells
          if (found := estimate_rows(results.pick(attacked, method=cell.point.method, attack=cell.point.attack)))}
    drops = [(hs[place] - hs[method, *place[1:]], *place) for place in hs if (method, *place[1:]) in hs]
    if not drops:
        return tables.NONE
    drop, other, p, n = max(drops)
    return f"{drop:.1f} points, against {names.method(other)} at p = {p}, n = {n}"
