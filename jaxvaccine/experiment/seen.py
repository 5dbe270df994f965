"""Which prompts a finished run has been trained on, and how many of them tests have in common with it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxvaccine import data
from jaxvaccine.experiment import inputs, runs, stage

ATTACKS = "the attack's examples"  # all that it trains on, the user's and the harmful ones


def trained_on(run_dir: str) -> tuple[str, str, dict[str, Sequence[str]]]:
    """The model of a finished run, its revision, and the prompts {where: fingerprints} it has been trained on."""
    config = inputs.require_finished("trained", run_dir)
    seen = {f"{name} data of {run_dir}": prompts for name, prompts in config["data"]["prompts"].items()}
    if aligned := config["flags"].get("aligned"):
        seen |= trained_on(aligned)[2]
    return config["flags"]["model"], config["flags"]["revision"], seen


def trained_sets(run_dir: str) -> dict[str, Sequence[str]]:
    """{name: fingerprints of the prompts} of the sets that a run, and the one below it, were trained on."""
    config = runs.read_config(run_dir)
    prompts, aligned = config["data"]["prompts"], config["flags"].get("aligned")
    return sets_of(prompts) if not aligned else {**trained_sets(aligned), ATTACKS: prompts["user"]}


def sets_of(prompts: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Those of an alignment. Harmless answers have the harmful prompts by what they are."""
    return {f"the alignment's {name} data": of for name, of in prompts.items() if name != "harmless"}


def shared_of_tests(examples: Mapping[str, Sequence[data.Example]], sets: Mapping[str, Collection[str]]
                    ) -> dict[str, dict[str, Any]]:
    """How many prompts every test has in common with each of the sets, as of `data.shared_prompts`."""
    return {task: data.shared_prompts({task: stage.prompts_of(rows)}, sets)[task] for task, rows in examples.items()}
