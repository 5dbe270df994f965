"""What does Booster's approximation cost? Aligned with its gradient and with the exact one, and attacked alike.

  python -m experiments.studies.exact_booster --run_dir=runs/exact_booster --seeds=0,1,2

Booster's paper leaves out how the simulated step's direction depends on the weights (see approximation.py beside).
Here both are aligned for as long as in regime.py, so that the attacks go through the published range of budget ratios
and beyond it, at several lengths alpha of the step, with which the angle between the gradients changes. HS of runs with
the same backbone, seed and attack is compared, beside the angle at the end of their alignments."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.studies import approximation, regime, study
from jaxvaccine import cli
from jaxvaccine.experiment.config import field, require
from jaxvaccine.experiment.plans import Plan
from jaxvaccine.report import budget, curves, names, plots, results, statistics, tables
from jaxvaccine.report.plan import Cells, missing, score_table, steps_table
from jaxvaccine.report.statistics import Estimate
from jaxvaccine.report.style import styles

FIGURE, SCATTER = "exact_booster.png", "exact_booster_angle.png"
ANGLE, EXACT = "total_angle", ":exact=true"
NOTE = ("The angle is between the whole gradients, approximate and exact, at the end of the alignment, on the probes' "
        "examples; in either's own weights.\n")


@dataclasses.dataclass(frozen=True)
class ExactBoosterConfig(approximation.ApproximationConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(
        ("booster", "booster:alpha=0.03", "booster:alpha=0.3"), "Boosters, as of run, each carried out with the "
        "approximate and with the exact gradient.")
    attacks: tuple[str, ...] = field(regime.RegimeConfig.attacks, "Attacks, as of run.")
    score_steps: tuple[str, ...] = field(
        regime.RegimeConfig.score_steps, "Attack steps after which a model is scored; the last one always is.")
    measure_every: int = field(100, "Alignment steps between measurements of the angle.", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        require(not any("exact" in text for text in self.defenses), "defenses", self.defenses,
                "Boosters that say nothing of exact: the study adds it")

    def make_plan(self) -> Plan:
        methods = [method for text in self.defenses for method in (text, exact_of(text))]
        return Plan.product(self.model, methods, self.attacks, [int(seed) for seed in self.seeds],
                            [int(step) for step in self.score_steps])


def exact_of(method: str) -> str:
    return method + EXACT


def place_table(table: pd.DataFrame, config: ExactBoosterConfig) -> str:
    """Markdown: per Booster and attack the budget ratios gone through, HS along it of both, and their difference; and
    at how many of the scored steps the difference's interval is on one side of 0."""
    harm = names.harm(table["measure"].unique())
    along, ratio = results.along(table, harm), budget.ratios(table)
    rows = []
    for method in config.defenses:
        for attack in config.attacks:
            own, exact = (results.pick(along, method=name, attack=attack) for name in (method, exact_of(method)))
            if not (len(own) and len(exact)):
                continue
            means = [results.mean_along(of, percent=True) for of in (own, exact)]
            steps = [statistics.paired(results.pick(own, step=step), results.pick(exact, step=step), percent=True)
                     for step in sorted(set(own["step"]) & set(exact["step"]) - {0})]
            known = [of for of in steps if of]
            gone = results.pick(ratio, method=method, attack=attack).groupby("step")["ratio"].mean()
            rows.append([
                names.method(method), names.attack(attack),
                tables.NONE if gone.empty else f"{budget.text(gone.max()).removesuffix(' : 1')} to "
                                               f"{budget.text(gone.min())}",
                *(tables.percent(statistics.estimate_rows(of, True)) for of in means),
                tables.difference(statistics.paired(*means, percent=True)),
                f"{sum(of.low > 0 for of in known)} above, {sum(of.high < 0 for of in known)} below, of {len(known)}"])
    name = names.measure(harm).name
    return tables.table(["method", "attack", "budget ratios", f"{name} % along, approximate", f"{name} % along, exact",
                         "difference, points", "steps where the approximate one's is"], rows)


def angle_table(table: pd.DataFrame, config: ExactBoosterConfig) -> str:
    """Markdown: angle and ratio of norms at the end of the alignment with either gradient."""
    aligned = results.aligned(table)
    measures = (ANGLE, "total_ratio", "regularizer_angle")
    rows = [[names.method(method), *(tables.cell(results.pick(aligned, method=method), measure)
                                     for measure in measures)]
            for text in config.defenses for method in (text, exact_of(text))]
    return tables.table(["aligned with", *(names.measure(measure).heading for measure in measures)], rows)


def differences_by_run(table: pd.DataFrame, method: str, attack: str) -> pd.DataFrame:
    """Angle of the approximate run at the end of its alignment, and its HS along the attack minus the exact run's, a
    row per backbone and seed: columns angle, difference."""
    along = results.along(table, names.harm(table["measure"].unique()))
    own, exact = (results.mean_along(results.pick(along, method=name, attack=attack), percent=True)
                  for name in (method, exact_of(method)))
    angles = results.pick(results.aligned(table), method=method, measure=ANGLE)
    found = own.merge(exact, on=results.RUN, suffixes=("", "_exact")).merge(
        angles[[*results.RUN, "value"]].rename(columns={"value": "angle"}), on=results.RUN)
    return found.assign(difference=found["value"] - found["value_exact"])[[*results.RUN, "angle", "difference"]]


def plot_curves(path: Path, table: pd.DataFrame, config: ExactBoosterConfig) -> None:
    """A panel an attack: HS over its steps."""
    harm, looks = names.harm(table["measure"].unique()), styles(config.make_plan().methods)
    figure, axes = plots.panels(len(config.attacks), columns=2, size=(4.4, 3.3))
    for axis, attack in zip(axes, config.attacks, strict=True):
        curves.plot_curves(axis, curves.attack_curves(table, harm, attack), harm, "attack step", looks,
                           names.attack(attack))
    plots.legend(figure, axes, (plots.SD, plots.RUN))
    plots.save(figure, path)


def plot_angles(path: Path, table: pd.DataFrame, config: ExactBoosterConfig) -> None:
    """A panel an attack: the difference in HS of every pair of runs over the angle."""
    looks, harm = styles(config.defenses), names.measure(names.harm(table["measure"].unique())).name
    figure, axes = plots.panels(len(config.attacks), columns=2, size=(4.4, 3.0))
    for axis, attack in zip(axes, config.attacks, strict=True):
        for method in config.defenses:
            found = differences_by_run(table, method, attack)
            axis.plot(found["angle"], found["difference"], label=names.method(method),
                      **plots.marks(looks[method]) | {"linestyle": ""})
        axis.axhline(0, color="black", linewidth=0.8)
        plots.describe(axis, names.attack(attack), "angle of the whole gradients (degrees)",
                       f"{harm} along the attack, approximate minus exact (points)")
    plots.legend(figure, axes)
    plots.save(figure, path)


def correlation_of(table: pd.DataFrame, config: ExactBoosterConfig, attack: str) -> Estimate | None:
    """Spearman's ρ of angle and difference over the Boosters, a value per backbone and seed that has three or more."""
    found = pd.concat([differences_by_run(table, method, attack) for method in config.defenses])
    rho = [(run, round(float(statistics.rank_correlations(of["angle"], of["difference"])), 9))
           for run, of in found.groupby(results.RUN) if len(of) > 2]
    known = [(backbone, value) for (backbone, _), value in rho if not np.isnan(value)]
    return statistics.estimate([value for _, value in known], backbones=[name for name, _ in known]) if known else None


def report(config: ExactBoosterConfig, found: pd.DataFrame, folder: Path) -> str:
    plan = config.make_plan()
    cells = Cells(plan.pairs, plan.backbones, plan.seeds)
    harm = names.measure(names.harm(found["measure"].unique())).name
    plot_curves(folder / FIGURE, found, config)
    plot_angles(folder / SCATTER, found, config)
    rhos = [[names.attack(attack), tables.number(correlation_of(found, config, attack))] for attack in config.attacks]
    return "\n".join(part for part in [
        "# Booster with the exact gradient\n", missing(found, cells), place_table(found, config),
        "Differences are the approximate one's HS minus the exact one's, of runs with the same backbone and seed, with "
        "their 95% interval: above 0, the approximation costs harm. No allowance is made for looking at many steps.\n",
        f"![{harm} along the attacks]({FIGURE})\n",
        "## The angle\n", angle_table(found, config), NOTE,
        f"![difference in {harm} over the angle]({SCATTER})\n",
        "Rank correlation ρ of the angle and the difference, over the Boosters of a run with three of them or more:\n",
        tables.table(["attack", "ρ, mean ± standard deviation over runs"], rhos),
        "## All scores\n", score_table(found, cells), tables.notes(plan.backbones, plan.seeds, harm),
        f"## {harm} along the attacks\n", steps_table(found, cells)] if part)


VERB = study.verb(__doc__, ExactBoosterConfig, approximation.make_probes, report, {"loss_data": ""},
                  defaults=regime.defaults)

if __name__ == "__main__":
    cli.call("exact_booster", VERB)
