"""Which prompts a finished run has been trained on, and how many of them tests have in common with it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxvaccine import data
from jaxvaccine.experiment import chain, inputs, stage

ATTACKS = "the attack's examples"  # all that it trains on, the user's and the harmful ones


def trained_on(run_dir: str) -> tuple[str, str, dict[str, Sequence[str]]]:
    """The model of a finished run, its revision, and the prompts {where: fingerprints} it has been trained on."""
    flags = inputs.require_finished("trained", run_dir)["flags"]
    seen = {f"{name} data of {link.run_dir}": prompts for link in reversed(chain.links(run_dir))
            for name, prompts in link.config["data"]["prompts"].items()}
    return flags["model"], flags["revision"], seen


def trained_sets(run_dir: str) -> dict[str, Sequence[str]]:
    """{name: fingerprints of the prompts} of the sets that a run, and those below it, were trained on; of several
    alignments or attacks one set each, of all of them."""
    of_links = [(link.config["script"], link.config["data"]["prompts"]) for link in chain.links(run_dir)]
    return chain.together(sets_of(prompts) if script == "align" else {ATTACKS: prompts["user"]}
                          for script, prompts in of_links)


def sets_of(prompts: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Those of an alignment. Harmless answers have the harmful prompts by what they are."""
    return {f"the alignment's {name} data": of for name, of in prompts.items() if name != "harmless"}


def shared_of_tests(examples: Mapping[str, Sequence[data.Example]], sets: Mapping[str, Collection[str]]
                    ) -> dict[str, dict[str, Any]]:
    """How many prompts every test has in common with each of the sets, as of `data.shared_prompts`."""
    return {task: data.shared_prompts({task: stage.prompts_of(rows)}, sets)[task] for task, rows in examples.items()}
