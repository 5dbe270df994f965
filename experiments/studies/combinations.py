"""Do defenses add up? Booster on every base, and the bases alone, each with Lisa, EWC and KL while the user fine-tunes.

  python -m experiments.studies.combinations --run_dir=runs/combinations --seeds=0,1,2

All attacked alike, HS and FA at the attack's end, and HS along it. What Booster adds to a base, and what a provider's
method adds to an alignment, are differences of the same runs."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.studies import study
from jaxvaccine import cli
from jaxvaccine.experiment.config import field, require
from jaxvaccine.experiment.methods import BASES, FINE_TUNING
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.report import names, plots, results, statistics, tables
from jaxvaccine.report.plan import Cells, missing, plan_report
from jaxvaccine.report.statistics import Estimate

FIGURE = "combinations.png"
ALONE = "none"  # no method while the user fine-tunes
ADDED = ("Differences of runs of the same backbone and seed, in points, in parentheses their 95% interval: below 0, "
         "the figure is lower with what was added.\n")


@dataclasses.dataclass(frozen=True)
class CombinationsConfig(study.StudyConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(
        tuple(BASES), "Alignments that Booster stands on, and that stand alone: " + ", ".join(BASES) + ".")
    tuning: tuple[str, ...] = field(
        tuple(FINE_TUNING), "Methods while the user fine-tunes, with their settings, as ewc:ewc_lam=1e8; none is none.")
    attacks: tuple[str, ...] = field(("poison_ratio=0.1",), "Attacks, as of run.")

    def __post_init__(self):
        super().__post_init__()
        require(set(self.defenses) <= set(BASES), "defenses", self.defenses, f"some of {', '.join(BASES)}")
        require(bool(self.tuning) and len(set(self.tuning)) == len(self.tuning), "tuning", self.tuning, "each once")
        known = [text.partition(":")[0] for text in self.tuning]
        require(set(known) <= set(FINE_TUNING), "tuning", self.tuning, f"some of {', '.join(FINE_TUNING)}")

    @property
    def alignments(self) -> tuple[str, ...]:
        """The bases alone, and Booster on each."""
        return (*self.defenses, *map(boosted, self.defenses))

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(combined(alignment, tuning) for alignment in self.alignments for tuning in self.tuning)


def boosted(base: str) -> str:
    """Booster on a base; on plain alignment it is Booster itself."""
    return "booster" if base == "sft" else f"booster:base_defense={base}"


def combined(alignment: str, tuning: str) -> str:
    return alignment if tuning == ALONE else f"{alignment}+{tuning}"


# (method, attack) -> a value per run.
Values = Callable[[str, str], pd.DataFrame]


def sights(table: pd.DataFrame) -> dict[str, Values]:
    """{heading: rows of a cell, one per run}: HS at the attack's end and along it, FA and over-refusal at the end."""
    measures = table["measure"].unique()
    harm, attacked = names.harm(measures), results.attacked(table)
    along = results.along(table, harm)
    found: dict[str, Values] = {
        f"{names.measure(harm).name} % after the attack": _at_the_end(attacked, harm)}
    if results.has_steps(along):
        found[f"{names.measure(harm).name} % along the attack"] = lambda method, attack: results.mean_along(
            results.pick(along, method=method, attack=attack), percent=True)
    for measure in (names.accuracy(measures), names.OVER_REFUSAL):
        if measure and (attacked["measure"] == measure).any():
            found[f"{names.measures([measure])[measure].name} % after the attack"] = _at_the_end(attacked, measure)
    return found


def _at_the_end(attacked: pd.DataFrame, measure: str) -> Values:
    return lambda method, attack: results.pick(attacked, method=method, attack=attack, measure=measure)


def matrix(config: CombinationsConfig, values: Values, attack: str) -> list[list[Estimate | None]]:
    """[alignments, tuning]."""
    return [[statistics.estimate_rows(values(combined(alignment, tuning), attack), percent=True)
             for tuning in config.tuning] for alignment in config.alignments]


def _columns(tuning: Sequence[str]) -> list[str]:
    return ["alone" if name == ALONE else f"+ {names.method(name)}" for name in tuning]


def added_table(config: CombinationsConfig, values: Values, attack: str) -> str:
    """Markdown: what Booster adds to each base, and each provider's method to each alignment."""
    def difference(method: str, reference: str) -> str:
        return tables.difference(statistics.paired(values(method, attack), values(reference, attack), percent=True))

    rows = [[f"Booster to {names.method(base)}", *(difference(combined(boosted(base), tuning), combined(base, tuning))
                                                   for tuning in config.tuning)] for base in config.defenses]
    if ALONE in config.tuning:
        rows += [[f"the column's method to {names.method(alignment)}",
                  *(tables.NONE if tuning == ALONE else difference(combined(alignment, tuning), alignment)
                    for tuning in config.tuning)] for alignment in config.alignments]
    return tables.table(["added", *_columns(config.tuning)], rows)


def plot(path: Path, config: CombinationsConfig, found: dict[str, list[list[Estimate | None]]]) -> None:
    """A heat map of every sight."""
    rows = [names.method(alignment) for alignment in config.alignments]
    figure, axes = plots.panels(len(found), columns=2, size=(2.6 + 0.55 * len(config.tuning), 1.3 + 0.26 * len(rows)))
    for axis, (title, cells) in zip(axes, found.items(), strict=True):
        values = np.array([[each.mean if each else np.nan for each in row] for row in cells])
        plots.heat_map(axis, title, rows, _columns(config.tuning), values,
                       colours=plots.GOOD if title.startswith("FA") else plots.HARM)
    plots.save(figure, path)


def report(config: CombinationsConfig, found: pd.DataFrame, folder: Path) -> str:
    plan, of = config.make_plan(), sights(found)
    text = ["# Defenses of both stages, combined\n", missing(found, Cells(plan.pairs, plan.backbones, plan.seeds))]
    for i, attack in enumerate(config.attacks):
        cells = {title: matrix(config, values, attack) for title, values in of.items()}
        name = FIGURE if i == 0 else FIGURE.replace(".", f"_{i}.")
        plot(folder / name, config, cells)
        text += [f"## {names.attack(attack)}\n", f"![alignment by method while fine-tuning]({name})\n"]
        for title, rows in cells.items():
            text += [f"{title}:\n", tables.table(
                ["alignment", *_columns(config.tuning)],
                [[names.method(alignment), *map(tables.percent, row)]
                 for alignment, row in zip(config.alignments, rows, strict=True)])]
        text += [part for title, values in of.items()
                 for part in (f"What is added, {title}:\n", added_table(config, values, attack))] + [ADDED]
    text += ["## All scores\n", plan_report(found, folder)]
    return "\n".join(part for part in text if part)


VERB = study.verb(__doc__, CombinationsConfig, lambda config: Probes(), report, {"loss_data": ""})

if __name__ == "__main__":
    cli.call("combinations", VERB)
