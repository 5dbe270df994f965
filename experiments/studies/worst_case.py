"""The strongest attack on every defense: a search with one budget for all, within a bound on what an attack costs.

  python -m experiments.studies.worst_case --run_dir=runs/worst_case --model=world,bases/1 --jobs=2

A defense that was shown against one attack at one learning rate was not shown. Every method gets --trials attacks, over
all sorts together, and the strongest are run again on all models and --seeds, which the search has not seen. An attack
may cost --loss of FA and of the benign requests answered. --tune_trials settings of every method are tried against the
usual attack first; the best stands beside the method as it is. Re-running goes on where it stopped; --trials may grow.

On a model of your own, give --recipe=none, the data, and the stages' settings; --sorts_file has sorts of your own."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.studies import attack_sorts, study
from jaxvaccine import cli
from jaxvaccine.experiment import runs
from jaxvaccine.experiment import search as engine
from jaxvaccine.experiment.compilation import keep_programs
from jaxvaccine.experiment.config import field, flat, require
from jaxvaccine.experiment.plans import Plan, split_method
from jaxvaccine.experiment.run import make_settings
from jaxvaccine.experiment.search import Search, SearchPart
from jaxvaccine.experiment.spaces import Sort, read_sorts
from jaxvaccine.experiment.tuning import tune
from jaxvaccine.report import runs as reports
from jaxvaccine.report import tables
from jaxvaccine.report.worst_case import worst_case_report

Flat = Mapping[str, Any]
# What stands, on the small world, for flags that are not given: a search scores thousands of models.
TESTS: Flat = {"harmful_test": "world_harmful@test[0:60]", "sst2_test": "world_rating@test[0:60]",
               "benign_test": "world_benign@test[0:60]", "loss_data": ""}


@dataclasses.dataclass(frozen=True)
class WorstCaseConfig(study.StudyConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(
        ("sft", "vaccine", "t_vaccine", "booster", "repnoise", "tar", "sft+lisa", "sft+kl"), "Methods, as of run.")
    seeds: tuple[str, ...] = field(("1", "2", "3"), "Seeds on which the strongest attacks are run again.")
    score_steps: tuple[str, ...] = field(
        ("10", "20", "40", "70", "100"), "--lanes: attack steps after which a model is scored, and where "
        "an attacker may stop; the last one always is.")
    lanes: bool = field(True, "Train all seeds of a setting at once, and score along the attack: for small models. "
                              "Without, every run is a folder, scored at its end.")
    sorts: tuple[str, ...] = field((), "Sorts of attack, by name; all unless given.")
    sorts_file: str = field("", "JSON file of sorts in the place of those that come with the study: {name: {setting: "
                                "[text, …] or {\"from\": …, \"to\": …}}}.")
    tune_trials: int = field(0, "Settings of every method that are tried before; 0 takes the method as it is alone.",
                             at_least=0)
    jobs: int = field(1, "Processes, each with a part of the methods and of the cores.", at_least=1)
    search: SearchPart = SearchPart()

    def chosen_sorts(self, attack: Flat) -> tuple[Sort, ...]:
        """The sorts of a search. attack: flat values of the attack that were given."""
        if self.sorts_file:
            known = read_sorts(self.sorts_file)
        elif self.on_world:
            known = attack_sorts.WORLD
        else:
            known = attack_sorts.sorts(attack.get("learning_rate", 1e-5), str(attack.get("steps", 0)), 4,
                                       ("Sure+ here is",), harmless=attack.get("harmless_data", ""))
        by_name = {sort.name: sort for sort in known}
        require(set(self.sorts) <= set(by_name), "sorts", self.sorts, "some of " + ", ".join(by_name))
        return tuple(by_name[name] for name in self.sorts) if self.sorts else known

    def make_plan(self) -> Plan:
        return Plan.product(self.model, self.methods, (engine.BENIGN, engine.USUAL), tuple(map(int, self.seeds)))


class Given(NamedTuple):
    """A study's config and the flat values of the stages that were given."""

    config: WorstCaseConfig
    align: Flat
    attack: Flat
    scores: Flat


def search_of(given: Given) -> Search:
    config = given.config
    return Search(
        config.search, config.chosen_sorts(given.attack), config.model, tuple(map(int, config.seeds)),
        tuple(map(int, config.score_steps)), make_settings(config, given.align, given.attack, {
            **(TESTS if config.on_world else {}), **given.scores}),
        Path(config.run_dir), config.lanes)


def groups(methods: Sequence[str]) -> list[list[str]]:
    """Methods that share an alignment, and so a folder, together."""
    found: dict[str, list[str]] = {}
    for method in methods:
        found.setdefault(split_method(method)[0], []).append(method)
    return list(found.values())


def carry_out(given: Given, methods: Sequence[str], refused: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Tunes and searches, in one process; returns the methods with those that tuning has added."""
    search, found = search_of(given), []
    for method in methods:
        of = [method]
        if given.config.tune_trials:
            of = list(dict.fromkeys((method, tune(search, method, given.config.tune_trials))))
        for text in of:
            engine.search_method(search, text, refused[method])
        found += of
    return found


def _start(cores: Any) -> None:
    """A process of its own takes the next core group, since two that share cores wait for each other."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores.get())
    keep_programs()


def carry_out_all(given: Given, methods: Sequence[str], refused: Mapping[str, Mapping[str, str]]) -> list[str]:
    """`carry_out` over --jobs processes."""
    jobs = given.config.jobs
    if jobs == 1:
        return carry_out(given, methods, refused)
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = context.SimpleQueue()
    for job in range(jobs):
        shares.put(set(cores[job % max(1, len(cores))::jobs]) or set(cores))
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _start, (shares,)) as pool:
        parts = [pool.submit(carry_out, given, group, refused) for group in groups(methods)]
        found = {text: None for part in parts for text in part.result()}
    # In the order of the flag, a tuned one behind what it was made of.
    order = list(methods)
    return sorted(found, key=lambda text: (max(i for i, name in enumerate(order) if text.startswith(name)), len(text)))


def open_folder(given: Given) -> None:
    """Makes the folder, or goes on in it.

    Raises:
      FileExistsError: it holds a search with other settings.
    """
    config = given.config
    # These may grow; the plans below compare what their cells are made of.
    free = {"trials", "top", "jobs", "defenses", "seeds", "overwrite", "progress", "run_dir", "sorts", "tune_trials",
            "by_category"}
    values = {name: value for name, value in flat(config).items() if name not in free}
    stages = {"align": dict(given.align), "attack": dict(given.attack), "scores": dict(given.scores)}
    runs.open_run(config.run_dir, "worst_case", json.loads(json.dumps({**values, **stages})), {},
                  overwrite=config.overwrite)


def study_worst_case(given: Given) -> str:
    """Carries out the search of a config; its report."""
    search, methods = search_of(given), given.config.methods
    refused = engine.check(search, methods)
    open_folder(given)
    found = carry_out_all(given, methods, refused)
    engine.collect(search, found)
    tables.write_report(search.root, worst_case_report(search, found, search.root))
    return reports.read(search.root)


VERB = study.own_verb(__doc__, WorstCaseConfig, lambda *given: study_worst_case(Given(*given)),
                      (*(name for name in study.WITHOUT if name != "lanes"), "attacks"))

if __name__ == "__main__":
    cli.call("worst_case", VERB)
