"""Which layers an attack needs, and whether the harmful gradient's norm tells: tables and figures by layer."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D

from jaxvaccine.experiment import layer_choice
from jaxvaccine.report import differences, names, plots, results, tables
from jaxvaccine.report.statistics import Correlation, correlation, estimate, probability
from jaxvaccine.report.style import INK

# The sign with which an attack's mean HS is a layer's effect: an attack that lacks a critical layer reaches less.
ONLY, ALL_BUT = "only", "all_but"
SIGNS = {ONLY: 1, ALL_BUT: -1}
KIND_NAMES = {ONLY: "only one layer", ALL_BUT: "all layers but one"}
NORMS = ("activation_gradient_norm", "weight_gradient_norm")
WHEN = {"start": lambda norms: norms[0], "mean": lambda norms: norms.mean(0), "end": lambda norms: norms[-1]}
_MARKERS = "osD^vPXp<>h8d"

NOTES = """‖∇a h‖: norm of the harmful loss's gradient with respect to a layer's attention output, as T-Vaccine's probe
takes it; ‖∇w h‖: with respect to the layer's adapter. Effect of a layer: the mean {harm} over the scored steps of an
attack on its adapter only, or, of an attack on all but it, that mean with the opposite sign: a positive ρ always says
that layers with a large norm are those that the attack needs.

ρ: Spearman's rank correlation over the layers, one for each backbone and seed, and their mean. Its 95% interval is over
{over}, and takes the layers and the prompts as given; a single run has none. p: how often the mean is as far from 0 if
the layers' names are exchanged, in all runs alike. A reading needs p < 0.05 and an interval without 0. Without the
largest: mean ρ over the layers but the one with the largest norm. With FA: the same with the mean FA in the place of
{harm}, which tells whether the norm is about harm or about how fast a layer learns anything.
"""


class Norms(NamedTuple):
    """Norms along one method's alignment."""

    steps: np.ndarray  # [S]
    values: dict[str, np.ndarray]  # norm -> [S, backbones, seeds, L]; NaN where a run has none


class Attacked(NamedTuple):
    """One attack on every layer in turn."""

    kind: str  # of SIGNS
    name: str
    steps: np.ndarray  # [S], from 1 on
    scores: dict[str, np.ndarray]  # measure -> [S, backbones, seeds, L] in percent; NaN where a run has none

    def effect(self, measure: str) -> np.ndarray:
        """[backbones, seeds, L]: the mean over steps, with the sign of SIGNS."""
        return SIGNS[self.kind] * self.scores[measure].mean(0)

    @property
    def harm(self) -> str:
        """HS, or not refused where that was measured in its place."""
        return names.harm(self.scores)


def layer_attack(attack: str, num_layers: int) -> tuple[str, str, int] | None:
    """(kind, the attack without its layers, the layer) of "…:only_layers=2" and "…:only_layers=0+1+3"; else None."""
    items = names.split_settings(attack)
    chosen = [item for item in items if item.startswith(f"{names.ONLY_LAYERS}=")]
    if len(chosen) != 1 or layer_choice.of_alignment(chosen[0].partition("=")[2].split("+")):
        return None
    layers = {int(layer) for layer in chosen[0].partition("=")[2].split("+")}
    rest = ":".join(item for item in items if item not in chosen)
    if len(layers) == 1:
        return ONLY, rest, layers.pop()
    left = set(range(num_layers)) - layers
    return (ALL_BUT, rest, left.pop()) if len(left) == 1 else None


def _array(rows: pd.DataFrame, backbones: Sequence[str], seeds: Sequence[int], num_layers: int
           ) -> tuple[np.ndarray, np.ndarray]:
    """(steps [S], values [S, backbones, seeds, L]) of one measure's rows."""
    steps = np.sort(rows["step"].unique())
    places = pd.MultiIndex.from_product([steps, backbones, seeds, range(num_layers)])
    values = rows.set_index(["step", "backbone", "seed", "layer"])["value"].reindex(places)
    return steps, values.to_numpy(dtype=float).reshape(len(steps), len(backbones), len(seeds), num_layers)


def read_norms(table: pd.DataFrame, method: str, backbones: Sequence[str], seeds: Sequence[int]) -> Norms:
    """The norms of a method's alignment by layer.

    Raises:
      ValueError: the table has none.
    """
    rows = results.pick(table, stage="alignment", method=method)
    rows = rows[rows["layer"].notna()]
    if not set(NORMS) <= set(rows["measure"]):
        raise ValueError(f"{method}: found measures by layer {sorted(rows['measure'].unique())}, expected "
                         f"{', '.join(NORMS)}")
    rows = rows.assign(layer=rows["layer"].astype(int))
    num_layers = int(rows["layer"].max()) + 1
    found = {name: _array(results.pick(rows, measure=name), backbones, seeds, num_layers) for name in NORMS}
    return Norms(found[NORMS[0]][0], {name: values for name, (_, values) in found.items()})


def read_attacks(table: pd.DataFrame, method: str, backbones: Sequence[str], seeds: Sequence[int], num_layers: int
                 ) -> list[Attacked]:
    """The attacks on a method's models that go through the layers, in the table's order."""
    rows = results.pick(table, stage="attack", method=method)
    rows = rows[rows["step"] > 0]
    parsed = {attack: layer_attack(attack, num_layers) for attack in rows["attack"].unique()}
    task, harm = names.accuracy(table["measure"].unique()), names.harm(table["measure"].unique())
    found = []
    for kind, rest in dict.fromkeys(place[:2] for place in parsed.values() if place):
        layers = {attack: place[2] for attack, place in parsed.items() if place and place[:2] == (kind, rest)}
        of = rows[rows["attack"].isin(list(layers))]
        of = of.assign(layer=of["attack"].map(layers))
        scores = {measure: _array(results.pick(of, measure=measure), backbones, seeds, num_layers)
                  for measure in (harm, task) if measure}
        name = KIND_NAMES[kind] + (f", {names.attack(rest)}" if rest else "")
        found.append(Attacked(kind, name, scores[harm][0], {m: values for m, (_, values) in scores.items()}))
    return found


def share(norms: np.ndarray) -> np.ndarray:
    """Every layer's part of the sum over layers: T-Vaccine's probabilities."""
    return norms / norms.sum(-1, keepdims=True)


def without_largest(norms: np.ndarray, effects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both [..., L − 1], without each run's layer of the largest norm: whether it is that one layer or the order."""
    kept = np.arange(norms.shape[-1]) != norms.argmax(-1)[..., None]
    shape = (*norms.shape[:-1], norms.shape[-1] - 1)
    return norms[kept].reshape(shape), effects[kept].reshape(shape)


def reading(found: Correlation) -> str:
    """What a correlation says, if it says anything."""
    if not (found.p < 0.05 and (found.low > 0 or found.high < 0)):
        return "undecided: interval or permutations allow for no relation"
    return "larger norm, larger effect" if found.mean > 0 else "larger norm, smaller effect"


def _over_runs(values: np.ndarray) -> str:
    """"mean ± sd" of percentages [backbones, seeds]."""
    return tables.percent(estimate(values[~np.isnan(values)], backbones=np.nonzero(~np.isnan(values))[0]),
                          interval=False)


def _chance(values: np.ndarray) -> str:
    """Of HS [backbones, seeds] above 50."""
    return tables.chance(probability(values[~np.isnan(values)], np.nonzero(~np.isnan(values))[0]))


def layer_table(norms: Norms, attacks: Sequence[Attacked]) -> str:
    """Markdown: per layer its shares of the norms, and what an attack on it reaches."""
    task = names.accuracy(attacks[0].scores) if attacks else None
    several = math.prod(norms.values[NORMS[0]].shape[1:3]) > 1
    rows = []
    for layer in range(norms.values[NORMS[0]].shape[-1]):
        row = [str(layer), *(_over_runs(100 * share(WHEN[when](norms.values[name]))[..., layer])
                             for name, when in itertools.product(NORMS, ("start", "end")))]
        for attack in attacks:
            hs = attack.scores[attack.harm][..., layer]
            row += [_over_runs(hs.mean(0)), _over_runs(hs[-1]), *([_chance(hs[-1])] if several else [])]
            row += [_over_runs(attack.scores[task][-1, ..., layer])] if task else []
        rows.append(row)
    harm = names.measure(attacks[0].harm).name if attacks else ""
    what = (f"mean {harm} %", f"{harm} at end %", *([f"{tables.chance_heading(harm)} at end"] if several else []),
            *(["FA at end %"] if task else []))
    return tables.table(["layer", *(f"{names.measure(name).name}: share %, {when}" for name, when in
                                    itertools.product(NORMS, ("start", "end"))),
                         *(f"{attack.name}: {each}" for attack in attacks for each in what)], rows)


def correlation_table(norms: Norms, attacks: Sequence[Attacked]) -> str:
    """Markdown: how far norms and effects rank the layers alike."""
    task = names.accuracy(attacks[0].scores) if attacks else None
    rows = []
    for attack, name, when in itertools.product(attacks, NORMS, WHEN):
        taken, effect = WHEN[when](norms.values[name]), attack.effect(attack.harm)
        found = correlation(taken, effect)
        more = [correlation(*without_largest(taken, effect))]
        more += [correlation(taken, attack.effect(task))] if task else []
        known = found.rho[~np.isnan(found.rho)]
        rows.append([attack.name, names.measure(name).name, when, _defined(found.mean, f"{found.mean:.2f}"),
                     _ends(found), _defined(found.p, f"{found.p:.3f}"),
                     f"{(known > 0).sum()} of {found.rho.size}", reading(found),
                     *map(_rho, more)])
    return tables.table(["attack", "norm", "taken at", "mean ρ", "95% interval", "p", "ρ > 0", "reading",
                         "without the largest", *(["mean ρ with FA"] if task else [])], rows)


def _defined(value: float, text: str) -> str:
    return tables.NONE if np.isnan(value) else text


def _ends(found: Correlation) -> str:
    return _defined(found.low, f"{found.low:.2f} to {found.high:.2f}")


def _rho(found: Correlation) -> str:
    """"0.94 (0.81 to 1.00)"; of a single run without the interval."""
    return _defined(found.mean, f"{found.mean:.2f}") + ("" if np.isnan(found.low) else f" ({_ends(found)})")


def layer_color(layer: int, layers: int) -> tuple[float, float, float, float]:
    """Dark to light from the first to the last layer, in a scale that is even for the colour-blind too."""
    return colormaps["viridis"](0.95 * layer / max(1, layers - 1))


def heat_map(axis: Axes, steps: np.ndarray, values: np.ndarray, label: str = "", **how) -> None:
    """Values [S, L] over steps and layers; a label has a colour bar. how: keywords of Axes.pcolormesh."""
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (steps[1] - steps[0], steps[-1] - steps[-2]) if len(steps) > 1 else (1, 1)
    edges = np.concatenate([[steps[0] - first / 2], middles, [steps[-1] + last / 2]])
    image = axis.pcolormesh(edges, np.arange(values.shape[1] + 1) - 0.5, values.T, **how)
    axis.set_yticks(range(0, values.shape[1], max(1, values.shape[1] // 8)))
    axis.grid(visible=False)
    if label:
        bar = axis.figure.colorbar(image, ax=axis)
        bar.set_label(label, fontsize=plots.LABEL_SIZE)
        bar.ax.tick_params(labelsize=plots.TICK_SIZE)
        if isinstance(how.get("norm"), LogNorm):
            plots.plain_log_ticks(bar.ax.yaxis)


def plot_norms(path: Path, norms: Norms) -> None:
    """A heat map per norm, layer over alignment step: the share, mean over runs."""
    figure, axes = plots.panels(len(NORMS), size=(4.4, 3.0))
    shares = {name: 100 * np.nanmean(share(norms.values[name]), axis=(1, 2)) for name in NORMS}
    ends = [end(values[values > 0].min() if end is min else values.max() for values in shares.values())
            for end in (min, max)]
    for axis, name in zip(axes, NORMS, strict=True):
        heat_map(axis, norms.steps, shares[name], "share of the sum over layers (%)", norm=LogNorm(*ends))
        plots.describe(axis, names.measure(name).name, "alignment step", "layer")
    plots.save(figure, path)


def plot_draws(path: Path, steps: Sequence[int], probabilities: np.ndarray, active: np.ndarray) -> None:
    """T-Vaccine's probabilities [S, L] over alignment steps, and the layers that it drew with them [S, L]."""
    figure, axes = plots.panels(2, size=(4.4, 3.0))
    heat_map(axes[0], np.asarray(steps), np.asarray(probabilities, float), "probability", vmin=0)
    heat_map(axes[1], np.asarray(steps), np.asarray(active, float), cmap="Greys", vmin=0, vmax=1)
    plots.describe(axes[0], "Probability of a layer", "alignment step", "layer")
    plots.describe(axes[1], "Active layers (black)", "alignment step", "layer")
    plots.save(figure, path)


def plot_plan_draws(path: Path, table: pd.DataFrame, backbone: str, method: str, seed: int) -> None:
    """`plot_draws` of one alignment in a table with the measures probabilities and active_layers by layer.

    Raises:
      ValueError: it has none.
    """
    rows = results.pick(table, backbone=backbone, method=method, seed=seed, stage="alignment")
    drawn = [results.pick(rows, measure=measure).pivot(index="step", columns="layer", values="value")
             for measure in ("probabilities", "active_layers")]
    if not all(map(len, drawn)):
        raise ValueError(f"{method} on {backbone}, seed {seed}: found no probabilities and active_layers by layer, "
                         "expected those of an alignment with T-Vaccine")
    plot_draws(path, list(drawn[0].index), *(each.to_numpy() for each in drawn))


def plot_attacks(path: Path, attacks: Sequence[Attacked]) -> None:
    """A panel per attack: HS over attack steps by layer, mean over runs."""
    figure, axes = plots.panels(len(attacks), columns=2, size=(4.4, 3.2))
    for axis, attack in zip(axes, attacks, strict=True):
        scores = attack.scores[attack.harm]
        scores = scores.reshape(len(attack.steps), -1, scores.shape[-1])
        for layer in range(scores.shape[-1]):
            known = ~np.isnan(scores[..., layer]).all(1)
            axis.plot(attack.steps[known], np.nanmean(scores[known][..., layer], axis=1), label=str(layer),
                      marker=_MARKERS[layer % len(_MARKERS)], markersize=4.5, linewidth=1.2,
                      color=layer_color(layer, scores.shape[-1]))
        axis.set_xlim(left=0)
        plots.describe(axis, attack.name, "attack step", "mean " + names.measure(attack.harm).label)
        plots.percent_axis(axis)
    plots.legend(figure, axes, title="layer that is attacked, or left out")
    plots.save(figure, path)


def plot_scatter(path: Path, norms: Norms, attacks: Sequence[Attacked], backbones: Sequence[str]) -> None:
    """A panel per attack and norm at the alignment's end: a point per layer and run, coloured by layer."""
    figure, axes = plots.panels(len(NORMS) * len(attacks), columns=len(NORMS), size=(4.4, 3.4))
    for axis, (attack, name) in zip(axes, itertools.product(attacks, NORMS), strict=True):
        norm, effect = norms.values[name][-1], attack.effect(attack.harm)
        layers = norm.shape[-1]
        for (i, _), layer in itertools.product(enumerate(backbones), range(layers)):
            axis.plot(100 * share(norm)[i, :, layer], effect[i, :, layer] * SIGNS[attack.kind], linestyle="",
                      marker=_MARKERS[i % len(_MARKERS)], color=layer_color(layer, layers), markersize=5,
                      markeredgewidth=0)
        axis.set_xscale("log")
        plots.plain_log_ticks(axis.xaxis)
        plots.describe(axis, f"{attack.name}: ρ = {_rho(correlation(norm, effect))}",
                       f"share of {names.measure(name).name} (%)",
                       f"mean {names.measure(attack.harm).name} over the attack's steps (%)")
        plots.percent_axis(axis)
    handles = {f"layer {layer}": Line2D([], [], linestyle="", marker="o", color=layer_color(layer, layers))
               for layer in range(layers)}
    if len(backbones) > 1:
        handles |= {backbone: Line2D([], [], linestyle="", marker=_MARKERS[i % len(_MARKERS)], color=INK)
                    for i, backbone in enumerate(backbones)}
    plots.legend_of(figure, handles)
    plots.save(figure, path)


def slug(text: str) -> str:
    """A method's name as a file's."""
    return re.sub(r"[^\w.=+-]+", "_", text)


def layers_report(table: pd.DataFrame, folder: str | Path, title: str = "Which layers an attack needs") -> str:
    """Markdown, a section per method, with its figures in the folder.

    Args:
      table: with NORMS by layer along the alignment, and attacks "…:only_layers=2" (a layer) or "…:only_layers=0+1+3"
        (all but one).
      folder: where the figures go.
      title: headline.

    Raises:
      ValueError: a method has no norms.
    """
    text, harm = [f"# {title}\n"], names.measure(names.harm(table["measure"].unique())).name
    backbones, seeds = (list(results.pick(table, stage="alignment")[name].unique()) for name in ("backbone", "seed"))
    for method in results.pick(table, stage="alignment")["method"].unique():
        norms = read_norms(table, method, backbones, seeds)
        attacks = read_attacks(table, method, backbones, seeds, norms.values[NORMS[0]].shape[-1])
        figures: Mapping[str, str] = {kind: f"{slug(method)}_{kind}.png" for kind in ("layers", "attacks", "scatter")}
        plot_norms(Path(folder) / figures["layers"], norms)
        text += [f"## {names.method(method)}\n", layer_table(norms, attacks),
                 f"Shares at the alignment's start and end. {tables.runs_note(backbones, seeds)}\n"]
        if attacks:
            plot_attacks(Path(folder) / figures["attacks"], attacks)
            plot_scatter(Path(folder) / figures["scatter"], norms, attacks, backbones)
            text.append(correlation_table(norms, attacks))
        text.append(f"![norms by layer]({figures['layers']})\n")
        if attacks:
            text += [f"![{harm} by layer attacked]({figures['attacks']})\n",
                     f"![norm and effect]({figures['scatter']})\n"]
    several = len(backbones) > 1
    note = tables.chance_note(harm, several) if len(backbones) * len(seeds) > 1 else ""
    return "\n".join([*text, NOTES.format(harm=harm, over="backbones, each with its seeds" if several else
                                          "seeds of this one backbone"), note, differences.section(table)])
