"""The attack that a method faced: a plan's text may stand for several, since methods have settings of their own."""

from pathlib import Path
from typing import Any

from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import flat
from jaxvaccine.experiment.plans import Plan, Settings, cell_configs
from jaxvaccine.experiment.results import Cell

# What tells attacks apart whose text is the same. The provider's defense is the method's, not the attack's.
NAMES = ("trains", "adapter", "rank", "lora_alpha", "targets", "dropout", "only_layers", "steps", "epochs",
         "batch_size", "optimizer", "learning_rate", "schedule", "warmup_ratio", "weight_decay", "clip_norm",
         "max_length", "n")


def faced(aligned: AlignConfig, attacked: AttackConfig) -> dict[str, Any]:
    """{name: value} of NAMES, with the adapter as the attack of this aligned model resolves it."""
    adapter = attacked.adapter.resolve(flat(aligned), attacked.method, attacked.ablation)
    values = {**flat(attacked), **flat(adapter)}
    if values["steps"]:
        values["epochs"] = None
    return {name: list(value) if isinstance(value, tuple) else value
            for name in NAMES for value in [values[name]]}


def of_plan(plan: Plan, settings: Settings, root: Path) -> list[dict[str, Any]]:
    """{"method", "attack", and what it faced} of every pair of the plan with an attack, JSON values."""
    found = []
    for method, text in plan.pairs:
        aligned, attacked = cell_configs(settings, root, Cell(plan.backbones[0], method, text, plan.seeds[0]))
        if attacked:
            found.append({"method": method, "attack": text, "faced": faced(aligned, attacked)})
    return found
