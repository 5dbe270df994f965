"""Published curves drawn beside ours, on axes that both have: parts of an attack, and of a model's depth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from jaxvaccine.report import names, plots, results
from jaxvaccine.report.curves import attack_curves
from jaxvaccine.report.statistics import PERCENT_BOUNDS, rank_correlations
from jaxvaccine.report.style import styles

# Of Booster's figure, as published.csv spells them.
MEASURES = ("harmful_training_loss", "harmful_test_loss", "harmful_score")
OURS, PUBLISHED = "ours", "published"


def _published_style(style) -> dict:
    return plots.marks(style) | {"linestyle": ":", "markerfacecolor": "white"}


def plot_statistics(path: Path, table: pd.DataFrame, attack: str, published: pd.DataFrame, model: str) -> list[str]:
    """Losses and HS along an attack, ours as lines with bands, the published as hollow marks; over % of the attack.

    Args:
      path: of the figure.
      table: ours, of a study that measures them.
      attack: which attack of it.
      published: rows of published.csv with a step.
      model: that ours is of.

    Returns:
      The measures that were drawn.
    """
    drawn = [measure for measure in MEASURES if (table["measure"] == measure).any()]
    every = {measure: attack_curves(table, measure, attack) for measure in drawn}
    figure, axes = plots.panels(max(1, len(drawn)))
    methods = dict.fromkeys(method for curves in every.values() for method in curves)
    looks = styles([*methods, *published["method"].unique()])
    for axis, measure in zip(axes, drawn, strict=False):
        of = names.measure(measure)
        for i, (method, curve) in enumerate(every[measure].items()):
            plots.band(axis, {100 * step / max(curve): each for step, each in curve.items()}, looks[method],
                       f"{names.method(method)}, {OURS} ({model})", plots.dodge(i, len(methods), 2),
                       PERCENT_BOUNDS if of.unit == names.PERCENT else (0, np.inf))
        for method, rows in published[published["measure"] == measure].groupby("method", sort=False):
            rows = rows.sort_values("step")
            axis.plot(100 * rows["step"] / published["step"].max(), rows["value"],
                      label=f"{names.method(method)}, {PUBLISHED}", **_published_style(looks[method]))
        plots.describe(axis, xlabel="% of the attack's steps", ylabel=of.label)
        if of.unit == names.PERCENT:
            plots.percent_axis(axis)
    plots.legend(figure, axes, (plots.SD, plots.RUN))
    plots.save(figure, path)
    return drawn


def relative(values: np.ndarray) -> np.ndarray:
    """[L] over their largest."""
    return np.asarray(values, dtype=float) / np.max(values)


def plot_layers(path: Path, table: pd.DataFrame, measure: str, published: pd.DataFrame, steps: Sequence[int]) -> None:
    """Norms by layer, each over its largest, over relative depth: ours after some steps of alignment, mean over runs,
    and the published series.

    Args:
      path: of the figure.
      table: ours, with the measure by layer along the alignment.
      measure: which.
      published: rows of published.csv with a layer; `setting` names the series.
      steps: of the alignment.
    """
    figure, axes = plots.panels(2, size=(4.6, 3.3), sharey=True)
    rows = results.pick(table, stage="alignment", measure=measure)
    for i, step in enumerate(steps):
        norms = results.pick(rows, step=step).groupby("layer")["value"].mean()
        if len(norms):
            axes[0].plot(norms.index / max(1, norms.index.max()), relative(norms.to_numpy()), marker="o", markersize=4,
                         color=str(0.7 * (1 - i / max(1, len(steps) - 1))), label=f"after {step} steps")
    series = list(published.groupby("setting", sort=False))
    for i, (name, found) in enumerate(series):
        found = found.sort_values("layer")
        axes[1].plot(found["layer"] / found["layer"].max(), relative(found["value"].to_numpy()), marker="o",
                     markersize=3, linestyle=":", color=str(0.7 * (1 - i / max(1, len(series) - 1))),
                     label=name.replace("=", " "))
    for axis, title in zip(axes, ("Ours", "Published (Llama-2-7B)"), strict=True):
        plots.describe(axis, title, "depth, 0 is the first layer", "harmful gradient norm over its largest")
        axis.set_ylim(0, 1.05)
        axis.legend(frameon=False, fontsize=plots.TICK_SIZE)
    plots.save(figure, path)


def depth_correlation(norms: np.ndarray) -> float:
    """Spearman's ρ of [L] norms with depth: −1 where every layer's is below that of the one before it."""
    return float(rank_correlations(np.arange(len(norms)), norms))
