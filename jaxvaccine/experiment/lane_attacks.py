"""How an attack on lanes begins, and what its result is: what `attack` does around the training, of all lanes."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxvaccine.experiment import ablation, lanes
from jaxvaccine.experiment.ablation import NoAblation, Prompts
from jaxvaccine.experiment.attack_config import AttackAdapter


def begin(aligned: lanes.Lanes, adapter: AttackAdapter, part: NoAblation, prompts: Prompts | None, seeds: Sequence[int]
          ) -> lanes.Lanes:
    """Where the attack's training starts.

    Args:
      aligned: with the aligned adapters.
      adapter: with nothing left open.
      part, prompts: of a refusal ablation.
      seeds: of each lane.
    """
    if part.when == "before":
        start = ablated(aligned, part, prompts)
        return lanes.adapted(start, adapter.sites().lora(), seeds) if adapter.trains == "adapter" else start
    if adapter.trains == "all":
        return lanes.whole(aligned)
    return lanes.merged(aligned, adapter.sites().lora(), seeds) if adapter.adapter == "new" else aligned


def result(of: lanes.Lanes, part: NoAblation, prompts: Prompts | None) -> lanes.Lanes:
    """What is scored after some steps."""
    return ablated(of, part, prompts) if part.when == "after" else of


def ablated(of: lanes.Lanes, part: NoAblation, prompts: Prompts) -> lanes.Lanes:
    """Whole models, each lane's own refusal direction projected out of its weights, with its adapter merged in."""
    merged = lanes.whole(of)
    found = [ablation.find(part, prompts, merged.model, *merged.lane(i)) for i in range(of.count)]
    return lanes.ablated(merged, jnp.stack([one.r for one in found]))
