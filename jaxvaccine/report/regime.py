"""Does a defense work, and where: HS against plain alignment's over the budget ratio of attacks, and a verdict."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from jaxvaccine.experiment.budget import PUBLISHED
from jaxvaccine.experiment.plans import Plan
from jaxvaccine.report import budget, names, plots, results, statistics, tables
from jaxvaccine.report.plan import Cells, missing, score_table, steps_table
from jaxvaccine.report.statistics import Estimate
from jaxvaccine.report.style import styles

BASE = "sft"
FIGURE, VARIANTS = "regime.png", "regime_variants.png"
# A difference in HS counts where over-refusal is no more than so many points above SFT's.
MARGIN = 5.0
NEW, CONTINUED = "new", "continue"
TITLES = {NEW: "New adapter on the merged weights", CONTINUED: "The aligned adapter goes on"}


class Published(NamedTuple):
    """Published figures along an attack, or one at its end.

    Attributes:
      method: as the command line spells it.
      adapter: NEW or CONTINUED, what the attack trained.
      ratios: [S] budget ratios.
      values: [S] HS in percent.
      label: whose they are.
    """

    method: str
    adapter: str
    ratios: Sequence[float]
    values: Sequence[float]
    label: str


class Place(NamedTuple):
    """One method under one attack after some steps, against SFT with the same backbones and seeds.

    Attributes:
      method, attack, step: where.
      ratio: the budget ratio of SFT's alignment to the attack so far.
      own: HS in percent.
      difference: HS minus SFT's, in points.
      refusal: over-refusal minus SFT's, in points; None where it was not scored.
      silence: no answer to a harmful prompt, minus SFT's, in points; None where it was not scored.
    """

    method: str
    attack: str
    step: int
    ratio: float
    own: Estimate
    difference: Estimate
    refusal: Estimate | None
    silence: Estimate | None

    @property
    def better(self) -> bool:
        return self.difference.high < 0

    @property
    def worse(self) -> bool:
        return self.difference.low > 0

    @property
    def alike(self) -> bool:
        """Whether over-refusal is within MARGIN of SFT's, or below it."""
        return self.refusal is None or self.refusal.mean <= MARGIN


def adapter_of(attack: str) -> str:
    """NEW or CONTINUED, of an attack that says so.

    Raises:
      ValueError: it does not.
    """
    items = dict(item.partition("=")[::2] for item in names.split_settings(attack))
    if items.get("adapter") not in TITLES:
        raise ValueError(f"attacks: found {attack!r}, expected adapter=new or adapter=continue in it")
    return items["adapter"]


def places(table: pd.DataFrame, methods: Iterable[str], attacks: Iterable[str]) -> list[Place]:
    """Of every method but SFT, attack and step that both have."""
    harm = names.harm(table["measure"].unique())
    ratio = budget.ratios(table)
    rows = {measure: results.along(table, measure) for measure in (harm, names.OVER_REFUSAL, names.NO_ANSWER)}
    found = []
    for attack in attacks:
        of_base = results.pick(ratio, method=BASE, attack=attack).groupby("step")["ratio"].mean()
        base = {measure: results.pick(of, method=BASE, attack=attack) for measure, of in rows.items()}
        for method in methods:
            own = {measure: results.pick(of, method=method, attack=attack) for measure, of in rows.items()}
            for step in sorted(set(own[harm]["step"]) & set(of_base.index)) if method != BASE else ():
                at = {measure: results.pick(of, step=step) for measure, of in own.items()}
                difference, refusal, silence = (
                    statistics.paired(of, results.pick(base[measure], step=step), percent=True)
                    for measure, of in at.items())
                if difference is not None:
                    found.append(Place(method, attack, int(step), float(of_base[step]),
                                       statistics.estimate_rows(at[harm], True), difference, refusal, silence))
    return found


def span(found: Sequence[Place]) -> str:
    """"400 to 80 : 1", the ratios of some places."""
    ratios = [place.ratio for place in found]
    if not ratios:
        return tables.NONE
    high, low = budget.text(max(ratios)), budget.text(min(ratios))
    return high if high == low else f"{high.removesuffix(' : 1')} to {low}"


class Standing(NamedTuple):
    """A method's places under attacks on one kind of adapter: all, those below SFT, those below it with more
    over-refusal, and those above it."""

    all: list[Place]
    better: list[Place]
    pair: list[Place]
    worse: list[Place]


def standing(found: Sequence[Place], method: str, adapter: str) -> Standing:
    of = [place for place in found if place.method == method and adapter_of(place.attack) == adapter]
    return Standing(of, [place for place in of if place.better and place.alike],
                    [place for place in of if place.better and not place.alike], [place for place in of if place.worse])


def verdict_table(found: Sequence[Place], methods: Sequence[str], harm: str = "HS") -> str:
    """Markdown: per adapter and method where HS is below SFT's, the largest difference there, and where it is above."""
    rows = []
    for adapter, title in TITLES.items():
        for method in methods:
            of, better, pair, worse = standing(found, method, adapter)
            if not of:
                continue
            best = min(better, key=lambda place: place.difference.mean) if better else None
            rows.append([
                title, names.method(method), f"{len(better)} of {len(of)}", span(better),
                f"{tables.difference(best.difference)} at {budget.text(best.ratio)}" if best else tables.NONE,
                tables.difference(best.refusal) if best else tables.NONE,
                tables.difference(best.silence) if best else tables.NONE,
                f"{len(pair)}" + (f" ({span(pair)})" if pair else ""),
                f"{len(worse)}" + (f" ({span(worse)})" if worse else "")])
    return tables.table([
        "attack", "method", "places below SFT", "at budget ratios", f"largest difference in {harm}, points",
        "over-refusal there, points", "no answer there, points",
        f"below SFT, with over {MARGIN:g} points more over-refusal", "places above SFT"], rows)


def verdicts(found: Sequence[Place], methods: Sequence[str], harm: str = "HS") -> str:
    """A sentence a method: where its HS is below SFT's, by intervals, in either kind of attack.

    harm: what HS is called; not refused where a judge of phrases judged.
    """
    lines = []
    for method in methods:
        parts = []
        for adapter in TITLES:
            of, better, pair, worse = standing(found, method, adapter)
            what = {NEW: "a new adapter", CONTINUED: "the aligned adapter"}[adapter]
            if not of:
                continue
            if better:
                best = min(better, key=lambda place: place.difference.mean)
                parts.append(f"against {what} it beats SFT from {span(better)}, by "
                             f"{tables.difference(best.difference)} points at {budget.text(best.ratio)}, where its "
                             f"{harm} is {tables.percent(best.own)}" + _silence(best))
            elif pair:
                best = min(pair, key=lambda place: place.difference.mean)
                parts.append(f"against {what} its {harm} is below SFT's from {span(pair)} with more over-refusal: "
                             f"{tables.difference(best.difference)} points of {harm} and "
                             f"{tables.difference(best.refusal)} of over-refusal at {budget.text(best.ratio)}")
            else:
                least = min(of, key=lambda place: place.difference.mean)
                parts.append(f"against {what} it beats SFT nowhere from {span(of)} (the lowest difference is "
                             f"{tables.difference(least.difference)} points, at {budget.text(least.ratio)})")
            if worse:
                parts[-1] += f", and is worse than SFT at {len(worse)} of {len(of)} places ({span(worse)})"
        if parts:
            lines.append(f"- **{names.method(method)}**: {'; '.join(parts)}.")
    return "\n".join(lines) + "\n"


def _silence(place: Place) -> str:
    """What is no answer is no harm, and no refusal either."""
    if place.silence is None or place.silence.mean <= MARGIN:
        return ""
    return f", and no answer {tables.difference(place.silence)} points more often"


def along_table(table: pd.DataFrame, methods: Sequence[str], attacks: Iterable[str]) -> str:
    """Markdown: HS as its mean along each whole attack, and its difference to SFT's: one number an attack, where
    `places` are many."""
    hs = results.along(table, names.harm(table["measure"].unique()))
    rows = []
    for attack in attacks:
        mean = {method: results.mean_along(results.pick(hs, method=method, attack=attack), True)
                for method in (BASE, *methods)}
        for method in methods:
            difference = statistics.paired(mean[method], mean[BASE], percent=True)
            if difference is not None:
                rows.append([names.attack(attack), names.method(method),
                             tables.percent(statistics.estimate_rows(mean[BASE], True)),
                             tables.percent(statistics.estimate_rows(mean[method], True)),
                             tables.difference(difference)])
    return tables.table(["attack", "method", "SFT's", "its own", "difference"], rows)


def _panel(axis: Axes, table: pd.DataFrame, methods: Sequence[str], attack: str, looks, harm: str,
           shown: Iterable[Published]) -> None:
    """HS of the methods over SFT's budget ratio, which falls to the right, with attack steps on top."""
    ratio = results.pick(budget.ratios(table), method=BASE, attack=attack).groupby("step")["ratio"].mean()
    rows = results.pick(results.along(table, harm), attack=attack)
    for i, method in enumerate(methods):
        found = statistics.estimate_steps(results.pick(rows, method=method), percent=True)
        plots.band(axis, {ratio[step]: each for step, each in found.items() if step in ratio.index}, looks[method],
                   names.method(method), plots.dodge(i, len(methods), 2), statistics.PERCENT_BOUNDS)
    for figure in shown:
        style = plots.marks(looks[figure.method]) | {"linestyle": ":", "markerfacecolor": "white", "markersize": 7}
        axis.plot(figure.ratios, figure.values, label=f"{names.method(figure.method)}, {figure.label}", zorder=2,
                  alpha=0.75, **style)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.axvspan(*PUBLISHED, color="#F2F2F2", zorder=0, label="the published attacks' ends, 200 to 800 : 1")
    plots.percent_axis(axis)
    if len(ratio):
        top = axis.secondary_xaxis("top", functions=_inverse(float(ratio.iloc[-1] * ratio.index[-1])))
        top.set_xticks(marks := _apart(ratio.index), [str(step) for step in marks])
        top.minorticks_off()
        top.tick_params(labelsize=plots.TICK_SIZE - 1)
        top.set_xlabel("attack steps", fontsize=plots.LABEL_SIZE - 1)


def _apart(steps: Iterable[int], factor: float = 1.4) -> list[int]:
    """Those whose labels stand side by side on a logarithmic axis, the last one among them."""
    kept: list[int] = []
    for step in sorted(steps, reverse=True):
        if not kept or kept[-1] >= factor * step:
            kept.append(step)
    return kept[::-1]


def _inverse(product: float):
    """Ratio to steps and back, at a constant learning rate."""
    def turn(x):
        x = np.asarray(x, dtype=float)
        return product / np.where(x > 0, x, np.nan)
    return turn, turn


def plot(path: Path, table: pd.DataFrame, methods: Sequence[str], attacks: Sequence[str],
         shown: Sequence[Published] = ()) -> None:
    """A panel an attack, HS over the budget ratio; published figures in the panels of their kind of adapter."""
    harm = names.harm(table["measure"].unique())
    looks = styles([*methods, *(figure.method for figure in shown)])
    figure, axes = plots.panels(len(attacks), columns=2 if len(attacks) in (2, 4) else 3, size=(4.6, 3.6))
    ratios = [*budget.ratios(table)["ratio"].dropna(), *(r for each in shown for r in each.ratios)]
    for axis, attack in zip(axes, attacks, strict=True):
        _panel(axis, table, methods, attack, looks, harm,
               [each for each in shown if each.adapter == adapter_of(attack)])
        axis.set_xlim(1.2 * max(ratios), 0.8 * min(ratios))
        items = dict(item.partition("=")[::2] for item in names.split_settings(attack))
        plots.describe(axis, f"{TITLES[adapter_of(attack)]}, learning rate {items.get('learning_rate', 'as given')}",
                       "budget ratio, alignment : attack", names.measure(harm).label)
    plots.legend(figure, axes, (plots.SD, plots.RUN),
                 "The attack goes on to the right. Dotted, hollow: the papers' Llama-2-7B")
    plots.save(figure, path)


def regime_report(table: pd.DataFrame, folder: Path, plan: Plan, shown: Sequence[Published] = ()) -> str:
    """Markdown of the study, with its figures in the folder.

    Args:
      table: results of the plan, as far as it is.
      folder: where figures go.
      plan: methods, one of them "sft", and attacks that say which adapter they train.
      shown: published figures, drawn in.
    """
    cells = Cells(plan.pairs, plan.backbones, plan.seeds)
    attacks = [attack for attack in plan.attacks if len(results.pick(table, attack=attack))]
    plain = [method for method in plan.methods if ":" not in method]
    variants = [method for method in plan.methods if ":" in method]
    found, others = places(table, plan.methods, attacks), [m for m in plan.methods if m != BASE]
    harm = names.measure(names.harm(table["measure"].unique())).name
    notes = tables.notes(plan.backbones, plan.seeds, harm)
    text = [
        "# Does a defense work, and where\n", missing(table, cells),
        f"{harm} along attacks of p = 0.1, over the budget ratio: the learning rate times LoRA scale, summed over the "
        "alignment's steps, against the same of the attack so far. The published attacks end at 200 to 800 : 1.\n"]
    if attacks:
        plot(folder / FIGURE, table, plain, attacks, shown)
        text.append(f"![{harm} over the budget ratio of attacks]({FIGURE})\n")
    text += [
        "## Verdicts\n",
        f"A place is an attack after a number of steps. A method beats SFT at a place where the 95% interval of the "
        f"paired difference in {harm} lies below 0 and over-refusal is at most {MARGIN:g} points above SFT's; no "
        "allowance is made for looking at many places."
        + (" This is one run: its intervals are over prompts alone, and another seed may say otherwise."
           if len(plan.backbones) * len(plan.seeds) == 1 else "") + "\n",
        verdicts(found, others, harm), verdict_table(found, others, harm),
        f"{harm} as its mean over an attack's steps, one number for the whole of it:\n",
        along_table(table, others, attacks)]
    if variants and attacks:
        families = [BASE, *dict.fromkeys(name for variant in variants for name in
                                         (variant.partition(":")[0], variant) if name in plan.methods)]
        plot(folder / VARIANTS, table, families, attacks)
        text += ["## Variants\n",
                 "T-Vaccine with the steps doubled trains each layer about as often as the others do; its ratio is "
                 "drawn as SFT's, so that all stand at the same attack.\n",
                 f"![{harm} of the variants]({VARIANTS})\n"]
    text += ["## All scores\n", score_table(table, cells), notes,
             names.notes(name for name in table["measure"].unique()) + "\n",
             f"## {harm} along the attacks\n", steps_table(table, cells)]
    return "\n".join(part for part in text if part)
