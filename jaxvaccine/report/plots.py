"""Figures in one style, by matplotlib's object-oriented interface: no global state, no display.

What a figure shows stands in its data: methods are moved aside by points on paper, not by numbers on an axis.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation, Transform

from jaxvaccine.report.statistics import UNBOUNDED, Estimate
from jaxvaccine.report.style import INK, PALE, Style

PANEL = (3.9, 3.0)  # inches
PERCENT_LIMITS = (-4, 104)
# Percentages this near to each other leave nothing to see.
SAME = 2.0
TITLE_SIZE, LABEL_SIZE, TICK_SIZE = 9.5, 9, 8  # points
_MARKER = 5.5  # points
HARM, GOOD = "YlOrRd", "YlOrRd_r"  # of heat maps
_RUN = {"linestyle": "", "marker": ".", "markersize": 5.0, "alpha": 0.5, "markeredgewidth": 0}
INTERVAL, SD, RUN, END = "95% interval", "± 1 standard deviation", "a single run", "the attack's end"
KEY = {INTERVAL: Line2D([], [], color=INK, linestyle="", marker="|", markersize=9), RUN: Line2D(
    [], [], color=INK, **_RUN), SD: Patch(color=INK, alpha=0.2, linewidth=0), END: Line2D(
    [], [], linestyle="", marker="o", markersize=8, markerfacecolor="white", markeredgecolor="black")}
LEGEND_SIZE = 8.5  # points


def panels(count: int, columns: int = 3, size: tuple[float, float] = PANEL, sharey: bool = False
           ) -> tuple[Figure, list[Axes]]:
    """A figure with that many axes, row by row. size: of one of them, in inches."""
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["bottom", "left"]].set_color(INK)
        axis.tick_params(which="both", labelsize=TICK_SIZE, color=INK)  # a short log axis names minor ticks
        axis.grid(color=PALE, linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def describe(axis: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Title and labels, over as many lines as they need; panels of a row that share a y label, without colour bars
    between them, have it once."""
    place = axis.get_subplotspec().get_topmost_subplotspec()
    grid = place.get_gridspec()
    width, height = axis.figure.get_figwidth() / grid.ncols, axis.figure.get_figheight() / grid.nrows

    others = [(other.get_ylabel(), other.get_subplotspec()) for other in axis.figure.axes]
    # A colour bar is in no panel; its label would be taken for that of the panel to its right.
    shared = [] if any(panel is None for _, panel in others) else [
        label for label, panel in others if panel.rowspan == place.rowspan]
    ylabel = _lines(ylabel, height - 0.5, LABEL_SIZE)
    axis.set_title(_lines(title, width, TITLE_SIZE), loc="left", fontsize=TITLE_SIZE)
    axis.set_xlabel(_lines(xlabel, width - 1.5, LABEL_SIZE), fontsize=LABEL_SIZE)
    if xlabel.endswith("step"):
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_ylabel("" if ylabel in shared else ylabel, fontsize=LABEL_SIZE)


def _lines(text: str, inches: float, size: float) -> str:
    """The text in as many lines as it needs, broken before a unit or behind a comma if that is enough."""
    most, lines = max(12, int(inches * 130 / size)), [""]
    for piece in re.split(r"(?<=,) | (?=\()", text):
        joined = f"{lines[-1]} {piece}".strip()
        if len(joined) <= most:
            lines[-1] = joined
        else:
            lines += textwrap.wrap(piece, most)
    return "\n".join(line for line in lines if line)


def save(figure: Figure, path: str | Path) -> None:
    """The figure as PNG, and as PDF beside it. Equal figures give equal files."""
    path = Path(path)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    with mpl.rc_context({"pdf.fonttype": 42}):  # fonts as fonts, which journals ask for
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def legend(figure: Figure, axes: Iterable[Axes], key: Iterable[str] = (), title: str | None = None) -> None:
    """Below all panels: what their artists are called, each name once, and what bars, bands and small points are.

    key: of KEY, what the panels show beside means.
    """
    found: dict[str, Any] = {}
    for axis in axes:
        handles = list(zip(*axis.get_legend_handles_labels(), strict=True))
        # Lines of reference come after what is compared.
        for handle, label in sorted(handles, key=lambda pair: not isinstance(pair[0], ErrorbarContainer)):
            found.setdefault(label, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
    legend_of(figure, found | {name: KEY[name] for name in key}, title)


def legend_of(figure: Figure, found: Mapping[str, Any], title: str | None = None) -> None:
    """These handles by name below all panels, for which the figure grows."""
    if not found:
        return
    widest = 0.5 + 0.068 * max(map(len, found))  # inches, at LEGEND_SIZE
    columns = max(1, min(len(found), int(figure.get_figwidth() / widest)))
    rows = -(-len(found) // columns) + bool(title)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.19 * rows)
    # Matplotlib fills columns; people read rows.
    order = [i for column in range(columns) for i in range(column, len(found), columns)]
    labels, handles = list(found), list(found.values())
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=columns,
                  frameon=False, fontsize=LEGEND_SIZE, title=title, title_fontsize=LEGEND_SIZE)


def aside(axis: Axes, x: float = 0.0, y: float = 0.0) -> Transform:
    """Data coordinates, moved by points on paper."""
    return axis.transData + ScaledTranslation(x / 72, y / 72, axis.figure.dpi_scale_trans)


def dodge(i: int, count: int, step: float = 4.0, most: float = 20.0) -> float:
    """Points by which the i-th of `count` methods is moved, so that equal means can be told apart; `most` from the
    first to the last."""
    return min(step, most / max(1, count - 1)) * (i - (count - 1) / 2)


def marks(style: Style) -> dict[str, Any]:
    """The style as keywords of Axes.plot and Axes.errorbar."""
    return {"color": style.color, "marker": style.marker, "markersize": _MARKER, "markerfacecolor": style.face,
            "linestyle": style.line, "linewidth": 1.3}


def curve(axis: Axes, x: Sequence[float], found: Sequence[Estimate | None], style: Style, label: str,
          move: float = 0.0, joined: bool = True) -> None:
    """Means over a numeric axis, with intervals, and every run as a small point beside; places without one are gaps."""
    known = [(place, each) for place, each in zip(x, found, strict=True) if each is not None]
    if not known:
        return
    keywords = marks(style) | ({} if joined else {"linestyle": ""})
    axis.errorbar([place for place, _ in known], [each.mean for _, each in known], _bars(known),
                  transform=aside(axis, move), capsize=2, elinewidth=1, label=label, zorder=3, **keywords)
    _include(axis, [place for place, _ in known for _ in range(3)], _ends(known))
    places = [place for place, each in known for _ in each.values if each.runs > 1]
    values = [value for _, each in known for value in each.values if each.runs > 1]
    _runs(axis, places, values, style, aside(axis, move + 3))


def _bars(known: Sequence[tuple[Any, Estimate]]) -> np.ndarray:
    """[2, N] lengths down and up from the mean; none where there is no interval."""
    return np.nan_to_num(np.array([[max(each.mean - each.low, 0), max(each.high - each.mean, 0)]
                                   if not math.isnan(each.low) else [0, 0] for _, each in known]).T)


def _ends(known: Sequence[tuple[Any, Estimate]]) -> list[float]:
    """Mean, low and high of each, the mean in the place of an end that is not known."""
    return [each.mean if math.isnan(value) else value for _, each in known
            for value in (each.mean, each.low, each.high)]


def _include(axis: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Makes room for these points: an axis does not see artists that are moved aside."""
    axis.update_datalim(np.column_stack([x, y]))
    axis.autoscale_view()


def _runs(axis: Axes, x: Sequence[float], y: Sequence[float], style: Style, transform: Transform) -> None:
    if len(x):
        axis.plot(x, y, color=style.color, transform=transform, zorder=2, **_RUN)
        _include(axis, x, y)


def band(axis: Axes, found: Mapping[int, Estimate], style: Style, label: str, move: float = 0.0,
         bounds: tuple[float, float] = UNBOUNDED) -> None:
    """Mean over steps, a band of ± one standard deviation over runs within bounds, and every run as a point.

    found: by step. The band is how far runs are apart, and no interval of their mean.
    """
    if not found:
        return
    steps = np.array(sorted(found), dtype=float)
    ordered = [found[step] for step in sorted(found)]
    mean = np.array([each.mean for each in ordered])
    axis.plot(steps, mean, label=label, zorder=3, **marks(style))
    if any(each.runs > 1 for each in ordered):
        sd = np.array([each.sd if each.runs > 1 else 0.0 for each in ordered])
        axis.fill_between(steps, np.clip(mean - sd, *bounds), np.clip(mean + sd, *bounds), alpha=0.13,
                          color=style.color, linewidth=0, zorder=1)
        _runs(axis, np.repeat(steps, [each.runs for each in ordered]),
              np.concatenate([each.values for each in ordered]), style, aside(axis, move))


def dots(axis: Axes, rows: Sequence[str], series: Mapping[str, tuple[Style, Sequence[Estimate | None]]]) -> None:
    """A dot plot: a row for each name, from above, and in it a mean with interval and runs for each of the series."""
    for i, (label, (style, found)) in enumerate(series.items()):
        known = [(-row, each) for row, each in enumerate(found) if each is not None]
        if not known:
            continue
        up = -dodge(i, len(series), 7.5, math.inf)
        axis.errorbar([each.mean for _, each in known], [row for row, _ in known], xerr=_bars(known), capsize=2,
                      elinewidth=1, label=label, zorder=3, transform=aside(axis, y=up),
                      **marks(style) | {"linestyle": ""})
        _include(axis, _ends(known), [row for row, _ in known for _ in range(3)])
        pairs = [(value, row) for row, each in known for value in each.values if each.runs > 1]
        _runs(axis, [p[0] for p in pairs], [p[1] for p in pairs], style, aside(axis, y=up - 3))
    axis.set_yticks(-np.arange(len(rows)), ["\n".join(textwrap.wrap(row, 26)) for row in rows])
    axis.set_ylim(-len(rows) + 0.5, 0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    for row in range(1, len(rows)):
        axis.axhline(0.5 - row, color=PALE, linewidth=0.8, zorder=0)


def dots_size(rows: int, series: int) -> tuple[float, float]:
    """Inches of a dot plot's panel in which the series of a row have room."""
    return 4.3, 0.9 + rows * max(0.3, 0.104 * series + 0.14)


def heat_map(axis: Axes, title: str, rows: Sequence[str], columns: Sequence[str], values: np.ndarray,
             most: float = 100.0, colours: str = HARM) -> None:
    """Numbers from 0 to `most` as colours, and whole in every field; NaN is an empty field with a dash.

    values: [rows, columns]. colours: HARM where much is bad, GOOD where little is.
    """
    axis.grid(False)
    image = axis.imshow(values, cmap=colours, vmin=0, vmax=most, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = not math.isnan(value) and sum(image.cmap(image.norm(value))[:3]) < 1.5
        axis.text(column, row, "–" if math.isnan(value) else f"{value:.0f}", ha="center", va="center",
                  fontsize=TICK_SIZE, color="white" if dark else "black")
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    describe(axis, title)


def percent_axis(axis: Axes, which: str = "y", found: Iterable[Estimate] = ()) -> None:
    """0 to 100; a quarter of it at either end, where all estimates lie there with their runs and intervals."""
    values = [value for each in found for value in (*each.values, each.low, each.high) if not math.isnan(value)]
    limits, ticks = PERCENT_LIMITS, range(0, 101, 20)
    if values and max(values) <= 25:
        limits, ticks = (-1, 26), range(0, 26, 5)
    elif values and min(values) >= 75:
        limits, ticks = (74, 101), range(75, 101, 5)
    axis.set(**{f"{which}lim": limits, f"{which}ticks": ticks})


def positive_axis(axis: Axes, which: str, found: Iterable[Estimate]) -> None:
    """From 0 on, unless a run is below: of a loss, the part of an interval that is below 0 says nothing."""
    if min((each.values.min() for each in found), default=-1) >= 0:
        low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
        axis.set(**{f"{which}lim": (max(low, -0.04 * high), high)})


def scale_of(values: Iterable[float], rate: bool = False) -> str:
    """"log" for a rate, and for positive values over a decade or more that lie evenly there; else "linear".

    With a 0 among values that would be "log" it is "symlog", linear up to the smallest of the others.
    """
    found = np.array(sorted(set(values)), dtype=float)
    positive = found[found > 0]
    if len(positive) < 2 or (found < 0).any():
        return "linear"

    def evenness(places: np.ndarray) -> float:
        gaps = np.diff(places)
        return gaps.max() / gaps.min()

    wide = positive[-1] / positive[0]
    # Of two values any scale is even: there only decades tell.
    even = len(positive) > 2 and evenness(np.log(positive)) < evenness(positive)
    if not (rate or (wide >= 10 and even) or wide >= 100):
        return "linear"
    return "log" if len(positive) == len(found) else "symlog"


def number_axis(axis: Axes, texts: Mapping[float, str], rate: bool = False) -> None:
    """An x axis with a tick at every number, as it is written, on the scale that fits them."""
    by_value = dict(sorted(texts.items()))
    scale = scale_of(by_value, rate)
    keywords = {"linthresh": min(value for value in by_value if value > 0)} if scale == "symlog" else {}
    axis.set_xscale(scale, **keywords)
    axis.set_xticks(list(by_value), list(by_value.values()))
    axis.minorticks_off()
    low, high = axis.transScale.transform([(min(by_value), 1), (max(by_value), 1)])[:, 0]
    pad = 0.08 * (high - low) or 0.5
    axis.set_xlim(*axis.transScale.inverted().transform([(low - pad, 1), (high + pad, 1)])[:, 0])


def spans_decades(values: Iterable[float]) -> bool:
    """Whether positive values are so far apart that a linear axis would show the large ones alone.

    That is when a quarter of them is below a thousandth of the largest: a start near 0 has no decades to show.
    """
    found = [value for value in values if math.isfinite(value)]
    return bool(found) and min(found) > 0 and max(found) >= 1000 * float(np.quantile(found, 0.25))


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def plain_log_ticks(axis: Any) -> None:
    """5, 10 and 20 on a logarithmic axis, and not powers of ten alone. axis: Axes.xaxis or Axes.yaxis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def constant(means: Iterable[float], percent: bool = True) -> str | None:
    """Why a panel of these means would show nothing; None if it would show something, as a single mean does."""
    found = [mean for mean in means if not math.isnan(mean)]
    if len(found) < 2:
        return None
    low, high = min(found), max(found)
    if low == high:
        return f"every mean is {low:.3g}"
    return f"every mean is {low:.1f} to {high:.1f}" if percent and high - low <= SAME else None


def left_out(reasons: Mapping[str, str]) -> str:
    """The line of text that names what was not drawn; "" if nothing was."""
    parts = "; ".join(f"{name} ({why})" for name, why in reasons.items())
    return f"Not drawn: {parts}.\n" if parts else ""
