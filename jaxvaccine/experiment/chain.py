"""Chains of runs: alignments and fine-tunings, each of which starts from what the one before left.

A link is a run's folder. The first is an alignment of a model as it comes; `--aligned` of a fine-tuning and `--start`
of an alignment name the one below.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvaccine.experiment import inputs, runs
from jaxvaccine.experiment.config import FieldError

RECORD = "chain"  # of a config.json's data
# What there was before there were chains: nothing but the run's own flags says it.
ORDINARY = (["align"], ["align", "finetune"])


class Link(NamedTuple):
    """A finished run."""

    run_dir: str
    config: Mapping[str, Any]  # its config.json

    @property
    def flags(self) -> Mapping[str, Any]:
        return self.config["flags"]


class Start(NamedTuple):
    """What a run starts from that stands on another."""

    links: tuple[Link, ...]  # from the first to the one that it starts from
    model: str  # as it comes, or, if a run left a whole one, the last that did
    revision: str
    has_adapter: bool  # whether the last left one, and no whole model

    @property
    def below(self) -> Link:
        """The run that it starts from."""
        return self.links[-1]

    @property
    def alignment(self) -> Link:
        """The last alignment."""
        return next(link for link in reversed(self.links) if link.config["script"] == "align")

    @property
    def aligned_prompts(self) -> dict[str, list[str]]:
        """{name: fingerprints} of all that any of the alignments has read."""
        return together(link.config["data"]["prompts"] for link in self.links if link.config["script"] == "align")

    def merged_under(self, merges: bool) -> str:
        """The run whose result lies merged under the adapter that trains; "" if that is one of `model` itself.

        merges: whether the result of the run below is merged, and its adapter does not train on.
        """
        if not self.has_adapter:
            return ""
        return self.below.run_dir if merges else merged_under(self.below.run_dir)


def together(sets: Iterable[Mapping[str, Iterable[str]]]) -> dict[str, list[str]]:
    """{name: all that any of the mappings has under it, each once}."""
    found: dict[str, dict[str, None]] = {}
    for of in sets:
        for name, prompts in of.items():
            found.setdefault(name, {}).update(dict.fromkeys(prompts))
    return {name: list(prompts) for name, prompts in found.items()}


def links(run_dir: str | Path) -> tuple[Link, ...]:
    """The chain that ends with a run, from its first link on. What the runs were made of is not compared."""
    found = [Link(str(run_dir), runs.read_config(run_dir))]
    while start := runs.below(found[-1].flags):
        found.append(Link(start, runs.read_config(start)))
    return tuple(reversed(found))


def start_from(name: str, run_dir: str, own: str) -> Start:
    """What a run in the folder `own` starts from, if the field `name` says that it starts from `run_dir`.

    Raises:
      FieldError: as of `inputs.require_finished`; `run_dir` is no run that trains; or `own` is a link of the chain
        itself, which --overwrite would delete before it is read.
      FileNotFoundError: there is no such run.
    """
    if (script := runs.read_config(run_dir)["script"]) not in ("align", "finetune"):
        raise FieldError(name, f"found {run_dir!r}, a run of {script}, expected one of align or finetune")
    config = inputs.require_finished(name, run_dir)
    chain = links(run_dir)
    if any(Path(link.run_dir).resolve() == Path(own).resolve() for link in chain):
        raise FieldError("run_dir", f"found {own!r}, on which {run_dir!r} stands or which it is, expected a folder of "
                                    "its own")
    left = inputs.left_model(run_dir)
    model, revision = (str(inputs.model_dir(run_dir)), "") if left else (
        config["flags"]["model"], config["flags"].get("revision", ""))
    return Start(chain, model, revision, not left)


def merged_under(run_dir: str | Path) -> str:
    """The run whose result lies merged under the adapter that a run left; "" if its adapter is one of the model that
    its flags name."""
    flags = runs.read_config(run_dir)["flags"]
    below = runs.below(flags)
    if not below or inputs.left_model(below):
        return ""
    return below if flags.get("adapter") == "new" else merged_under(below)


def record(chain: Sequence[Link], script: str = "") -> dict[str, Any]:
    """{"chain": [{run_dir, script, defense, …}]}, what a run's config.json has of the runs below it, the first first;
    {} where it is no more than an alignment, and a fine-tuning of it.

    script: of the run itself, if it is a link too.
    """
    if [*(link.config["script"] for link in chain), *([script] if script else [])] in ORDINARY:
        return {}
    return {RECORD: [_described(link) for link in chain]}


def _described(link: Link) -> dict[str, Any]:
    flags = link.flags
    found = {"run_dir": link.run_dir, "script": link.config["script"], "defense": flags["defense"]}
    if link.config["script"] == "finetune":
        found |= {"poison_ratio": link.config["data"].get("poison_ratio", flags["poison_ratio"]),
                  "trains": runs.flag(link.config, "trains"), "ablate": runs.flag(link.config, "ablate")}
    return {**found, "adapter": runs.flag(link.config, "adapter")}
