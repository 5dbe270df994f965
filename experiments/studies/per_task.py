"""Does Booster need other settings for every task of its users? lam × alpha, for several tasks.

  python -m experiments.studies.per_task --run_dir=runs/per_task --seeds=0,1,2

A provider aligns once, and users bring tasks of their own: ratings, ratings of which half are negated, and two things
of which the last is to be rated. Every setting meets the same attack with every task's data. The regret of one setting
for all is what it costs in HS, and in FA, against each task's own best. Settings are chosen by the mean HS along the
attack on all runs but one, and the regret is measured on that one, each in turn: chosen and measured on the same runs
it would be too large. The plans lie in a folder a task."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from experiments.studies import study
from jaxvaccine import cli
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.config import field, require
from jaxvaccine.experiment.evaluate_config import TESTS
from jaxvaccine.experiment.plans import folder_name
from jaxvaccine.experiment.run import run
from jaxvaccine.report import names, plots, results, statistics, tables
from jaxvaccine.report.differences import REFERENCE
from jaxvaccine.report.plan import Cells, missing, score_table
from jaxvaccine.report.results import read_results
from jaxvaccine.report.statistics import Estimate

FIGURE = "per_task.png"
# Beside the small world's recipe: within fewer the negated ratings are not learnt.
ATTACK = {"steps": 150}
NOTE = ("Regret: what the common setting costs against the task's own, in points, with the 95% interval over runs; "
        "below 0, the common one was the better choice on runs that neither was chosen on. HS is the mean along the "
        "attack, FA that at its end.\n")
ONE_RUN = "One run: there is none to choose settings on and another to measure them on, and so no regret.\n"

Run = tuple[str, int]  # backbone, seed


@dataclasses.dataclass(frozen=True)
class PerTaskConfig(study.StudyConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(("booster",), "Boosters, each at every lam and alpha.")
    lams: tuple[str, ...] = field(("0.05", "0.2", "0.8"), "Weights of the regularizer.")
    alphas: tuple[str, ...] = field(("0.03", "0.1", "0.3"), "Lengths of the simulated step.")
    tasks: tuple[str, ...] = field(
        ("world_rating@attack", "world_negation@attack", "world_contrast@attack"), "User's data, a source a task.")
    task_tests: tuple[str, ...] = field(
        ("world_rating@test[0:100]", "world_negation@test[0:100]", "world_contrast@test[0:100]"),
        "Test of each task, in the same order: of SST-2's labels, or agnews, gsm8k.")
    attacks: tuple[str, ...] = field(("poison_ratio=0.1",), "The attack, as of run, but for the user's data.")

    def __post_init__(self):
        super().__post_init__()
        require(len(self.attacks) == 1, "attacks", self.attacks, "one")
        require(len(self.tasks) == len(self.task_tests) > 1, "task_tests", self.task_tests,
                f"one for each of --tasks, two or more: {', '.join(self.tasks)}")
        for name in ("lams", "alphas", "tasks"):
            values = getattr(self, name)
            require(bool(values) and len(set(values)) == len(values), name, values, "each once")
        for source in (*self.tasks, *self.task_tests):
            require(bool(source), "tasks", source, "a data source")
        require(all(text.partition(":")[0] == "booster" for text in self.defenses), "defenses", self.defenses,
                "Boosters")

    @property
    def settings(self) -> list[str]:
        """The methods that are chosen among."""
        return [f"{text}:lam={lam}:alpha={alpha}" for text in self.defenses
                for lam, alpha in itertools.product(self.lams, self.alphas)]

    @property
    def methods(self) -> tuple[str, ...]:
        return (REFERENCE, *self.settings)

    def of_task(self, i: int) -> tuple["PerTaskConfig", dict[str, str], dict[str, str]]:
        """(config of the task's own folder, its flat values of the attack, of the evaluation)."""
        folder = Path(self.run_dir) / folder_name(self.tasks[i])
        kind, = recipes.kinds(self.task_tests[i])
        own = f"{kind}_test" if f"{kind}_test" in TESTS else "sst2_test"
        tests = {name: "" for name in ("sst2_test", "agnews_test", "gsm8k_test")} | {own: self.task_tests[i]}
        return dataclasses.replace(self, run_dir=str(folder)), {"user_data": self.tasks[i]}, tests


class Regret(NamedTuple):
    """Of a task, in points over the runs that were left out."""

    hs: Estimate
    fa: Estimate


# [tasks, settings, runs], NaN where a run is missing.
Scores = np.ndarray


def scores(found: Sequence[pd.DataFrame], attack: str, methods: Sequence[str]) -> tuple[Scores, Scores, list[Run]]:
    """(HS along the attack, FA at its end, the runs that all tasks and settings have), from a table a task."""
    sides, common = [], None
    for table in found:
        measures = table["measure"].unique()
        harm, task = names.harm(measures), names.accuracy(measures)
        along, attacked = results.along(table, harm), results.attacked(table)
        for method in methods:
            hs = _by_run(results.mean_along(results.pick(along, method=method, attack=attack)))
            fa = _by_run(results.pick(attacked, method=method, attack=attack, measure=task))
            sides.append((hs, fa))
            here = hs.keys() & fa.keys()
            common = here if common is None else common & here
    runs = sorted(common or ())
    shape = len(found), len(methods), len(runs)
    hs, fa = (np.array([[side[i][run] for run in runs] for side in sides]).reshape(shape) for i in (0, 1))
    return hs, fa, runs


def _by_run(rows: pd.DataFrame) -> dict[Run, float]:
    return {(of.backbone, of.seed): of.value for of in rows.itertuples()}


def chosen(hs: Scores) -> tuple[int, list[int]]:
    """(the setting with the least HS over all tasks and runs, and that of each task)."""
    means = hs.mean(axis=2)
    return int(means.mean(axis=0).argmin()), means.argmin(axis=1).tolist()


def regrets(hs: Scores, fa: Scores, runs: Sequence[Run]) -> list[Regret]:
    """A task each, on every run with the settings that the others choose; none of a single run."""
    if len(runs) < 2:
        return []
    costs = np.empty((2, hs.shape[0], len(runs)))
    for left in range(len(runs)):
        common, own = chosen(np.delete(hs, left, axis=2))
        for task, best in enumerate(own):
            costs[:, task, left] = (hs[task, common, left] - hs[task, best, left],
                                    fa[task, best, left] - fa[task, common, left])
    backbones = [backbone for backbone, _ in runs]
    return [Regret(*(statistics.estimate(side[task], backbones=backbones) for side in costs))
            for task in range(hs.shape[0])]


def title(source: str) -> str:
    """"world_rating@attack" -> "world rating"."""
    return ", ".join(kind.replace("_", " ") for kind in recipes.kinds(source))


def regret_table(config: PerTaskConfig, hs: Scores, fa: Scores, runs: Sequence[Run]) -> str:
    """Markdown: per task its own best on all runs, HS and FA with it and with the common one, and the regrets."""
    methods, (common, own), left_out = config.settings, chosen(hs), regrets(hs, fa, runs)
    rows = [[title(task), names.method(methods[best]), f"{hs[i, best].mean():.1f}", f"{hs[i, common].mean():.1f}",
             f"{fa[i, best].mean():.1f}", f"{fa[i, common].mean():.1f}",
             *(map(tables.difference, left_out[i]) if left_out else (tables.NONE, tables.NONE))]
            for i, (task, best) in enumerate(zip(config.tasks, own, strict=True))]
    return f"The common setting, of all runs: {names.method(methods[common])}.\n\n" + tables.table(
        ["task", "its own best", "HS % with its own", "HS % with the common one", "FA % with its own",
         "FA % with the common one", "regret in HS, chosen on other runs", "regret in FA"], rows)


def plot(path: Path, config: PerTaskConfig, hs: Scores, fa: Scores) -> None:
    """Heat maps: above HS along the attack, below FA at its end, a column a task, lam by alpha."""
    grid = [f"{text}, " * (len(config.defenses) > 1) + f"lam = {lam}"
            for text in map(names.method, config.defenses) for lam in config.lams]
    columns = [f"alpha = {alpha}" for alpha in config.alphas]
    figure, axes = plots.panels(2 * len(config.tasks), columns=len(config.tasks),
                                size=(2.2 + 0.55 * len(columns), 1.4 + 0.3 * len(grid)))
    for of, (what, values, colours) in enumerate((("HS (%) along the attack", hs, plots.HARM),
                                                  ("FA (%) at its end", fa, plots.GOOD))):
        for i, task in enumerate(config.tasks):
            plots.heat_map(axes[of * len(config.tasks) + i], f"{title(task)}: {what}", grid, columns,
                           values[i].mean(axis=1).reshape(len(grid), len(columns)), colours=colours)
    plots.save(figure, path)


def report(config: PerTaskConfig, found: Sequence[pd.DataFrame], folder: Path) -> str:
    """Markdown of all tasks. found: a table of results a task."""
    plan = config.make_plan()
    cells = Cells(plan.pairs, plan.backbones, plan.seeds)
    text = ["# lam and alpha per task\n", *(f"{title(task)}: {line}" for task, table in zip(
        config.tasks, found, strict=True) if (line := missing(table, cells)))]
    hs, fa, runs = scores(found, config.attacks[0], config.settings)
    if runs:
        plot(folder / FIGURE, config, hs, fa)
        text += [regret_table(config, hs, fa, runs), NOTE if len(runs) > 1 else ONE_RUN,
                 tables.runs_note(plan.backbones, plan.seeds) + "\n",
                 f"![HS and FA by lam and alpha, a task each]({FIGURE})\n"]
    for task, table in zip(config.tasks, found, strict=True):
        text += [f"## {title(task)}\n", score_table(table, cells)]
    harm = names.measure(names.harm(found[0]["measure"].unique())).name
    text.append(tables.notes(plan.backbones, plan.seeds, harm))
    return "\n".join(part for part in text if part)


def carry_out(config: PerTaskConfig, align: Mapping[str, Any], attack: Mapping[str, Any], given: Mapping[str, Any]
              ) -> str:
    """Carries out what has not been carried out yet of all tasks' plans; returns the report.

    align, attack, given: flat values of the three stages that were given.
    """
    found, folders = [], []
    for i in range(len(config.tasks)):
        of, own_attack, own_tests = config.of_task(i)
        usual = ATTACK if config.on_world else {}
        run(of, align, {**usual, **attack, **own_attack}, {"loss_data": "", **given, **own_tests})
        folders.append(Path(of.run_dir))
        found.append(read_results(folders[-1]))
    root = Path(config.run_dir)
    return study.publish(root, report(config, found, root), *folders)


VERB = study.own_verb(__doc__, PerTaskConfig, carry_out)

if __name__ == "__main__":
    cli.call("per_task", VERB)
