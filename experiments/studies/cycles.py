"""What is left of a defense when users fine-tune again and again, and what if the provider aligns again between them?

  python -m experiments.studies.cycles --run_dir=runs/cycles --model=world --seeds=0,1,2

Every method is aligned once, and then goes through --cycles fine-tunings of users, harmful and benign in turn
(--attacks). Behind each but the last it is aligned again for --again_steps steps, with each of --again, or not at all
(none). HS and FA behind every fine-tuning and every alignment; what aligning again with T-Vaccine gives beyond equally
many steps of SFT is a difference of the same runs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from experiments.studies import study
from jaxvaccine import cli
from jaxvaccine.experiment.attack_config import AttackData
from jaxvaccine.experiment.config import field, flat, require
from jaxvaccine.experiment.cycles import AGAIN, ALIGNED, NOTHING, Cycles, check_again, run_cycles
from jaxvaccine.experiment.methods import ALIGNMENT
from jaxvaccine.experiment.parts import split_operational
from jaxvaccine.experiment.plans import attack_values, split_method
from jaxvaccine.experiment.run import check_given, make_settings
from jaxvaccine.report import names, plots, results, statistics, tables
from jaxvaccine.report.results import read_results
from jaxvaccine.report.statistics import Estimate
from jaxvaccine.report.style import INK, styles

FIGURE = "cycles.png"
# What stands, on the small world, for flags that are not given: 100 steps of one user would undo everything at once.
ATTACK = {"steps": 40}
BEHIND = 0.5  # of a cycle, how far behind a fine-tuning the alignment that follows it is drawn
# May grow from one call to the next, or say nothing of results.
FREE = ("run_dir", "model", "defenses", "seeds", "again", "overwrite", "progress", "by_category", "score_base", "lanes",
        "plan", "score_steps", "poison_ratios")
NOTE = ("A cycle is a user's fine-tuning; between two of them the model is aligned again, or not. Cycle 0 is the first "
        "alignment. The first fine-tuning has a run's own seed, and so is a plan's; the later ones and the alignments "
        "draw with seeds derived from it.\n")
LINES = ("In the figure lines go through both, what a user left at whole numbers and what the alignment behind it made "
         "of it half a step later; shaded are the users with harmful rows.\n")
DIFFERENCES = ("Differences of runs of the same backbone and seed at the end of a cycle, in points, in parentheses "
               "their 95% interval: below 0, the figure is lower where the model was aligned again so.\n")


@dataclasses.dataclass(frozen=True)
class CyclesConfig(study.StudyConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(("sft", "t_vaccine", "booster"), "First alignments, as of run.")
    attacks: tuple[str, ...] = field(
        ("poison_ratio=0.1", "poison_ratio=0"), "Users' fine-tunings, in turn, as the attacks of run.")
    cycles: int = field(6, "Fine-tunings, one after the other.", at_least=1)
    again: tuple[str, ...] = field(
        (NOTHING, "t_vaccine", "sft"), "Alignments between them, as --defenses; none does not align again.")
    again_steps: int = field(50, "Steps of an alignment between, of every method.", at_least=1)
    again_adapter: Literal["continue", "new"] = field(
        "continue", "An alignment between trains the adapter that there is on, or a new one on the merged weights. "
        "Users' is --attack_adapter.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.attacks), "attacks", self.attacks, "at least one")
        require(bool(self.again) and len(set(self.again)) == len(self.again), "again", self.again, "each once")
        for text in self.again:
            aligned, tuning = split_method(text)
            require(not tuning and (text == NOTHING or aligned.partition(":")[0] in ALIGNMENT), "again", self.again,
                    f"none, or some of {', '.join(ALIGNMENT)}")
            require(":steps=" not in text, "again", self.again, "no steps: all have --again_steps, and are compared")

    def with_steps(self, again: str) -> str:
        """An alignment between, as of a plan."""
        return again if again == NOTHING else f"{again}:steps={self.again_steps}"

    def make_cycles(self) -> Cycles:
        return Cycles(self.model, self.methods, tuple(map(int, self.seeds)), self.attacks,
                      tuple(map(self.with_steps, self.again)), self.cycles, self.again_adapter)


def carry_out(config: CyclesConfig, align: Mapping[str, Any], attack: Mapping[str, Any], scores: Mapping[str, Any]
              ) -> str:
    """Carries out what has not been carried out yet; returns the report.

    align, attack, scores: flat values of the three stages that were given.
    """
    root, cycles = Path(config.run_dir), config.make_cycles()
    scores = {"loss_data": "", **scores}
    attack = {**(ATTACK if config.on_world else {}), **attack}
    settings = make_settings(config, align, attack, scores)
    check_again(cycles, settings)
    check_given(cycles.plan, settings, align, attack)
    fixed = {**{name: value for name, value in flat(config).items() if name not in FREE},
             **{name: split_operational(given)[0] for name, given in (("align", align), ("attack", attack),
                                                                      ("scores", scores))}}
    run_cycles(cycles, settings, root, fixed, config.overwrite)
    return study.publish(root, report(config, read_results(root), root), root / ALIGNED)


def of_chain(table: pd.DataFrame, config: CyclesConfig, method: str, again: str, measure: str) -> pd.DataFrame:
    """Rows of a measure behind every fine-tuning of a chain, and of the first alignment at step 0."""
    rows = results.pick(table, method=method, attack=AGAIN + config.with_steps(again), measure=measure)
    return rows[(rows["stage"] == "attack") | (rows["step"] == 0)]


def estimates(table: pd.DataFrame, config: CyclesConfig, method: str, again: str, measure: str
              ) -> dict[float, Estimate]:
    """{cycles gone through: estimate}, half a cycle more behind an alignment."""
    rows = results.pick(table, method=method, attack=AGAIN + config.with_steps(again), measure=measure)
    after = (rows["stage"] == "alignment") & (rows["step"] > 0)
    found = {float(step): of for step, of in statistics.estimate_steps(rows[~after], percent=True).items()}
    found |= {step + BEHIND: of for step, of in statistics.estimate_steps(rows[after], percent=True).items()}
    return dict(sorted(found.items()))


def name_of(again: str) -> str:
    return "not aligned again" if again == NOTHING else f"aligned again with {names.method(again)}"


def measures_of(table: pd.DataFrame) -> list[str]:
    """Harm, and the user's task where it was tested."""
    found = table["measure"].unique()
    return [names.harm(found), *([task] if (task := names.accuracy(found)) else [])]


def cycle_table(table: pd.DataFrame, config: CyclesConfig, method: str) -> str:
    """Markdown: a line for every cycle, with each measure of every chain of the method behind the fine-tuning, and
    behind the alignment that follows it."""
    headings, columns = [], []
    for measure in measures_of(table):
        for again in config.again:
            headings.append(f"{names.measures([measure])[measure].heading}, {name_of(again)}")
            columns.append(estimates(table, config, method, again, measure))
    rows = []
    for cycle in range(config.cycles + 1):
        user = "first alignment" if cycle == 0 else names.attack(config.make_cycles().user(cycle))
        rows.append([str(cycle), user, *(tables.percent(of.get(float(cycle))) for of in columns)])
        if any(cycle + BEHIND in of for of in columns):
            rows.append([str(cycle), "aligned again", *(tables.percent(of.get(cycle + BEHIND)) for of in columns)])
    return tables.table(["cycle", "behind", *headings], rows)


def difference_table(table: pd.DataFrame, config: CyclesConfig) -> str:
    """Markdown: behind the last fine-tuning of each sort of user, what aligning again changed: against not doing so,
    and of all other methods against SFT."""
    last = {user: max(c for c in range(1, config.cycles + 1) if config.make_cycles().user(c) == user)
            for user in config.attacks[:config.cycles]}
    compared = [(again, other) for other in (NOTHING, "sft") for again in config.again
                if other in config.again and again not in (NOTHING, other)]
    rows = []
    for method in config.methods:
        for user, cycle in last.items():
            for again, other in compared:
                found = [statistics.paired(*(results.pick(of_chain(table, config, method, each, measure), step=cycle)
                                             for each in (again, other)), percent=True)
                         for measure in measures_of(table)]
                if any(found):
                    rows.append([names.method(method), f"{cycle}, {names.attack(user)}",
                                 f"{name_of(again)}, to {name_of(other)}", *map(tables.difference, found)])
    return tables.table(["first alignment", "cycle", "difference", *(
        names.measures([measure])[measure].heading for measure in measures_of(table))], rows) if rows else ""


def plot(path: Path, config: CyclesConfig, table: pd.DataFrame) -> None:
    """HS above, FA below, over cycles; a column a method, a line every way to align again."""
    measures, looks = measures_of(table), styles(config.again)
    figure, axes = plots.panels(len(measures) * len(config.methods), columns=len(config.methods))
    for row, measure in enumerate(measures):
        for column, method in enumerate(config.methods):
            axis = axes[row * len(config.methods) + column]
            plots.number_axis(axis, {float(cycle): str(cycle) for cycle in range(config.cycles + 1)})
            for cycle in harmful_cycles(config):
                axis.axvspan(cycle - BEHIND, cycle, color=INK, alpha=0.08, linewidth=0, zorder=0)
            for i, again in enumerate(config.again):
                found = estimates(table, config, method, again, measure)
                plots.curve(axis, list(found), list(found.values()), looks[again], name_of(again),
                            plots.dodge(i, len(config.again)))
            plots.describe(axis, title=names.method(method) if row == 0 else "", xlabel="cycles of fine-tuning",
                           ylabel=names.measures([measure])[measure].label)
            plots.percent_axis(axis)
    several = len(config.seeds) * len(config.model) > 1
    plots.legend(figure, axes, (plots.INTERVAL, *([plots.RUN] if several else [])))
    plots.save(figure, path)


def harmful_cycles(config: CyclesConfig) -> list[int]:
    """Cycles of users with harmful rows."""
    cycles = config.make_cycles()
    return [cycle for cycle in range(1, config.cycles + 1)
            if attack_values(cycles.user(cycle)).get("poison_ratio", AttackData.poison_ratio) > 0]


def report(config: CyclesConfig, found: pd.DataFrame, folder: Path) -> str:
    """Markdown, with the figure in the folder."""
    text = ["# Fine-tuned again and again\n"]
    expected = len(config.model) * len(config.methods) * len(config.again) * len(config.seeds)
    there = len(found[["backbone", "method", "attack", "seed"]].drop_duplicates())
    if there < expected:
        text.append(f"Missing so far: {expected - there} of {expected} chains.\n")
    if there:
        plot(folder / FIGURE, config, found)
        text += [NOTE, f"![HS and FA over cycles]({FIGURE})\n", LINES]
        for method in config.methods:
            text += [f"## {names.method(method)}\n", cycle_table(found, config, method)]
        if differences := difference_table(found, config):
            text += ["## What aligning again changes\n", differences, DIFFERENCES]
        measures = [name for name in found["measure"].unique() if name in (*measures_of(found), names.OVER_REFUSAL)]
        text += [tables.spread_note(config.model, config.seeds) + "\n", names.notes(measures) + "\n"]
    return "\n".join(text)


VERB = study.own_verb(__doc__, CyclesConfig, carry_out, (*study.WITHOUT, "score_steps"))

if __name__ == "__main__":
    cli.call("cycles", VERB)
