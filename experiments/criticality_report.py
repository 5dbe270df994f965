"""The report on layers: norms along the alignment, effects of attacks by layer, and how far the two rank alike."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import reports
from experiments.sweep_report import ALIGNED, MARKERS, folder_name, mean_sd
from jaxvaccine import runs

# The sign with which an attack's mean HS is a layer's effect: an attack that lacks a critical layer reaches less.
KINDS = {"only": 1, "all_but": -1}
NORMS = {"activation_gradient_norm": "‖∇a h‖, attention output", "weight_gradient_norm": "‖∇w h‖, adapter"}
WHEN = {"start": lambda norms: norms[0], "mean": lambda norms: norms.mean(0), "end": lambda norms: norms[-1]}
RESAMPLES = 10_000


class Attacked(NamedTuple):
    """One attack on every layer of one base's models, N seeds."""

    steps: list[int]  # [S], all but 0
    scores: dict[str, np.ndarray]  # task -> [L, S, N] in percent

    def mean_over_steps(self, task: str) -> np.ndarray:
        """[N, L] in percent."""
        return self.scores[task].mean(axis=1).T


def read_alignment(folder: Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """Steps and {norm: [S, N, L]}."""
    found = runs.read_json(folder / f"{ALIGNED}.json")
    return found["steps"], {name: np.array(found[name]) for name in NORMS}


def read_attack(folder: Path, num_layers: int) -> Attacked:
    cells = [runs.read_json(folder / f"{layer}.json")["scores"] for layer in range(num_layers)]
    steps = sorted(int(step) for step in cells[0] if int(step))
    return Attacked(steps, {task: np.array([[cell[str(step)][task] for step in steps] for cell in cells])
                            for task in cells[0][str(steps[0])]})


def _standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks over the last axis, equal values sharing their mean, of mean 0 and norm 1; NaN where all are equal."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return np.divide(ranks, norm, out=np.full(ranks.shape, np.nan), where=norm > 0)


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ over the last axis of [..., L]; NaN where one of both is constant."""
    return (_standard_ranks(x) * _standard_ranks(y)).sum(-1)


def bootstrap_interval(rho: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95% interval of the mean of [bases, seeds]: bases drawn with replacement, then seeds in each of them."""
    bases, seeds = rho.shape
    drawn = rng.integers(bases, size=(RESAMPLES, bases, 1)), rng.integers(seeds, size=(RESAMPLES, bases, seeds))
    values = rho[drawn].reshape(RESAMPLES, -1)
    known = ~np.isnan(values)
    # A resample without any is left out.
    means = np.nansum(values, axis=1)[known.any(1)] / known.sum(axis=1)[known.any(1)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def permutation_p(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    """Two-sided p of the mean ρ of [runs, L], none of them constant, if it did not matter which layer is which.

    The layers are exchanged in all runs alike: runs share what is due to a layer's place, and are no independent
    evidence of it. All orders of up to seven layers are gone through, else RESAMPLES random ones and the one found.
    """
    layers = x.shape[-1]
    if math.factorial(layers) <= RESAMPLES:
        orders = list(itertools.permutations(range(layers)))
    else:
        orders = [np.arange(layers), *(rng.permutation(layers) for _ in range(RESAMPLES))]
    x, y = _standard_ranks(x), _standard_ranks(y)
    means = np.array([(x[:, list(order)] * y).sum(-1).mean() for order in orders])
    return float((np.abs(means) >= abs(means[0]) - 1e-12).mean())


def correlation_row(norms: Sequence[np.ndarray], effects: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean ρ, interval and p of [seeds, L] of every base."""
    x, y = np.stack(norms), np.stack(effects)
    rho = rank_correlations(x, y)
    if np.isnan(rho).all():
        return {"rho": rho, "mean": math.nan, "interval": (math.nan, math.nan), "p": math.nan}
    runs_of = [values.reshape(-1, values.shape[-1]) for values in (x, y)]
    known = ~np.isnan(rho.ravel())
    return {"rho": rho, "mean": float(np.nanmean(rho)), "interval": bootstrap_interval(rho, np.random.default_rng(0)),
            "p": permutation_p(*(values[known] for values in runs_of), np.random.default_rng(0))}


def without_largest(norms: np.ndarray, effects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both [..., L − 1], without each run's layer of the largest norm: whether it is that one layer or the order."""
    kept = np.arange(norms.shape[-1]) != norms.argmax(-1)[..., None]
    shape = (*norms.shape[:-1], norms.shape[-1] - 1)
    return norms[kept].reshape(shape), effects[kept].reshape(shape)


def verdict(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    if not row["p"] < 0.05 or low <= 0 <= high:
        return "undecided: interval or permutations allow for no relation"
    return "larger norm, larger effect" if row["mean"] > 0 else "larger norm, smaller effect"


def share(norms: np.ndarray) -> np.ndarray:
    """Every layer's part of the sum over layers: T-Vaccine's probabilities."""
    return norms / norms.sum(-1, keepdims=True)


def plot_layers(path: Path, steps: Sequence[int], norms: Mapping[str, np.ndarray]) -> None:
    """A heat map per norm, layer over alignment step: the share, mean over runs. norms: [S, runs, L]."""
    figure, axes = reports.panels(len(NORMS))
    for axis, (name, title) in zip(axes, NORMS.items(), strict=True):
        values = 100 * share(norms[name]).mean(1).T
        image = axis.imshow(values, aspect="auto", origin="lower", interpolation="nearest", norm="log")
        axis.set(xlabel="alignment step", ylabel="layer", title=f"share of {title} (%)")
        shown = range(0, len(steps), max(1, -(-len(steps) // 6)))
        axis.set_xticks(shown, [str(steps[i]) for i in shown])
        axis.set_yticks(range(len(values)))
        _plain_ticks(figure.colorbar(image, ax=axis).ax.yaxis)
    figure.savefig(path, dpi=130)


def plot_attack(path: Path, attacks: Mapping[str, Sequence[Attacked]]) -> None:
    """A panel per attack: mean HS over attack steps by layer."""
    figure, axes = reports.panels(len(attacks))
    for axis, (text, found) in zip(axes, attacks.items(), strict=True):
        scores = np.concatenate([attacked.scores["harmful_score"] for attacked in found], axis=-1).mean(-1)
        for layer, values in enumerate(scores):
            axis.plot(found[0].steps, values, marker=MARKERS[layer % len(MARKERS)], markersize=4,
                      color=_color(layer, len(scores)), label=str(layer))
        axis.set(xlabel="attack step", ylabel="HS (%)", ylim=(-4, 104), title=text.replace(":", "\n", 1))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), title="layer", loc="outside right center",
                  ncols=1 + len(scores) // 16)
    figure.savefig(path, dpi=130)


def plot_scatter(path: Path, norms: Mapping[str, Sequence[np.ndarray]], effects: Mapping[str, Sequence[np.ndarray]],
                 bases: Sequence[str]) -> None:
    """A panel per attack and norm at the alignment's end: a point per layer and run, coloured by layer."""
    figure, axes = reports.panels(len(NORMS), len(effects))
    for axis, (text, (name, title)) in zip(axes, itertools.product(effects, NORMS.items()), strict=True):
        for i, (norm, effect) in enumerate(zip(norms[name], effects[text], strict=True)):
            for layer in range(norm.shape[1]):
                axis.scatter(100 * share(norm)[:, layer], effect[:, layer] * KINDS[text.partition(":")[0]], s=22,
                             marker=MARKERS[i % len(MARKERS)], color=_color(layer, norm.shape[1]), linewidth=0)
        row = correlation_row(norms[name], effects[text])
        axis.set(xlabel=f"share of {title} (%)", ylabel="mean HS of the attack (%)",
                 xscale="log", title=f"{text.partition(':')[0]}: ρ = {row['mean']:.2f} [{row['interval'][0]:.2f}, "
                       f"{row['interval'][1]:.2f}]")
        _plain_ticks(axis.xaxis)
        axis.grid(alpha=0.3)
    handles = [axes[0].scatter([], [], color=_color(layer, norm.shape[1]), label=f"layer {layer}")
               for layer in range(norm.shape[1])]
    handles += [axes[0].scatter([], [], color="grey", marker=MARKERS[i % len(MARKERS)], label=base)
                for i, base in enumerate(bases)]
    figure.set_figheight(figure.get_figheight() + 0.6)
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=130)


def _plain_ticks(axis) -> None:
    """5, 10 and 20 on a logarithmic axis, and not powers of ten alone."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _color(layer: int, layers: int):
    from matplotlib import colormaps

    return colormaps["viridis"](0.95 * layer / max(1, layers - 1))


def _section(root: Path, bases: Sequence[str], method: str, attacks: Sequence[str]) -> list[str]:
    folders = [root / folder_name(base) / folder_name(method) for base in bases]
    steps, norms = read_alignment(folders[0])[0], [read_alignment(folder)[1] for folder in folders]
    num_layers = norms[0]["activation_gradient_norm"].shape[-1]
    found = {text: [read_attack(folder / folder_name(text), num_layers) for folder in folders] for text in attacks}
    effects, learning = ({text: [KINDS[text.partition(":")[0]] * attacked.mean_over_steps(task)
                                 for attacked in found[text]] for text in attacks}
                         for task in ("harmful_score", "sst2"))
    of_runs = {name: np.concatenate([n[name] for n in norms], axis=1) for name in NORMS}  # [S, runs, L]

    layers = []
    for layer in range(num_layers):
        row = [str(layer), *(mean_sd(100 * share(WHEN[when](of_runs[name]))[:, layer])
                             for name, when in itertools.product(NORMS, ("start", "end")))]
        for text in attacks:
            scores = {task: np.concatenate([a.scores[task][layer] for a in found[text]], axis=-1)
                      for task in ("harmful_score", "sst2")}
            row += [mean_sd(scores["harmful_score"].mean(0)), *(mean_sd(s[-1]) for s in scores.values())]
        layers.append(row)
    correlations = []
    for text, (name, title), when in itertools.product(attacks, NORMS.items(), WHEN):
        taken = [WHEN[when](n[name]) for n in norms]
        row = correlation_row(taken, effects[text])
        of_task = correlation_row(taken, learning[text])
        others = correlation_row(*zip(*map(without_largest, taken, effects[text]), strict=True))
        known = row["rho"][~np.isnan(row["rho"])]
        correlations.append([
            text, title, when, f"{row['mean']:.2f}", f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}",
            f"{row['p']:.3f}", f"{(known > 0).sum()} of {row['rho'].size}", verdict(row),
            *(f"{more['mean']:.2f} ({more['interval'][0]:.2f} to {more['interval'][1]:.2f})"
              for more in (others, of_task))])
    name = folder_name(method)
    plot_layers(root / f"{name}_layers.png", steps, of_runs)
    plot_attack(root / f"{name}_attacks.png", found)
    plot_scatter(root / f"{name}_scatter.png", {n: [WHEN["end"](of[n]) for of in norms] for n in NORMS}, effects, bases)
    return [
        f"## {method}\n",
        reports.table(["layer", *(f"{title}: share %, {when}" for title, when in
                                  itertools.product(NORMS.values(), ("start", "end"))),
                       *(f"{text}: {what} %" for text in attacks for what in ("mean HS", "HS at end", "FA at end"))],
                      layers),
        f"Shares at the alignment's start and end; mean ± standard deviation over bases ({', '.join(bases)}) and "
        "seeds.\n",
        reports.table(["attack", "norm", "taken at", "mean ρ", "95% interval", "p", "ρ > 0", "reading",
                       "without the largest", "mean ρ with FA"], correlations),
        f"![norms by layer]({name}_layers.png)\n", f"![HS by layer attacked]({name}_attacks.png)\n",
        f"![norm and effect]({name}_scatter.png)\n"]


NOTES = """‖∇a h‖: norm of the harmful loss's gradient with respect to a layer's attention output, as T-Vaccine's probe
takes it; ‖∇w h‖: with respect to the layer's adapter. Effect of a layer: the mean HS over the scored steps of an attack
on its adapter only, or, of an attack on all but it, that mean with the opposite sign: a positive ρ always says that
layers with a large norm are those that the attack needs.

ρ: Spearman's rank correlation over the layers, one for each base and seed, and their mean. The interval draws bases and
then seeds with replacement. p: how often the mean is as far from 0 if the layers' names are exchanged, in all runs
alike. A reading needs p < 0.05 and an interval without 0. Without the largest: mean ρ over the layers but the one with
the largest norm. With FA: the same with the mean FA in the place of HS, which tells whether the norm is about harm or
about how fast a layer learns anything.
"""


def write(root: Path, bases: Sequence[str], methods: Sequence[str], attacks: Sequence[str]) -> str:
    """report.md with its plots; returns its text."""
    text = "\n".join(["# Which layers an attack needs\n",
                      *itertools.chain(*(_section(root, bases, method, attacks) for method in methods)), NOTES])
    (root / reports.REPORT).write_text(text, encoding="utf-8")
    return text
