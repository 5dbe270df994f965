"""Studies at their smallest: settings of a few steps, and commands in this process."""

import jax

from jaxvaccine import cli, data
from jaxvaccine.experiment import lanes, recipes, stage
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import make

SEEDS = (0, 5)
# Fewer sites compile faster.
ALIGN = {"steps": 6, "batch_size": 4, "harmful_batch_size": 4, "targets": ("q_proj", "down_proj")}
ATTACK = {"n": 20, "batch_size": 4, "steps": 2}
TESTS = {"harmful_test": "world_harmful@test[0:4]", "sst2_test": "world_rating@test[0:4]",
         "benign_test": "world_benign@test[0:4]"}
# The same as flags of a study.
FLAGS = ("--recipe=world", "--seeds=0,5", "--noprogress", "--steps=6", "--batch_size=4", "--harmful_batch_size=4",
         "--targets=q_proj,down_proj", f"--harmful_test={TESTS['harmful_test']}")
ATTACK_FLAGS = ("--attack_n=20", "--attack_batch_size=4", "--attack_steps=2")


def align_config(model="-", **changes):
    return make(AlignConfig, changes, {**recipes.WORLD_ALIGN, **ALIGN, "model": model, "run_dir": "-",
                                       "progress": False})


def attack_config(**changes):
    return make(AttackConfig, changes, {**recipes.WORLD_ATTACK, **ATTACK, "test_data": TESTS["harmful_test"],
                                        "aligned": "-", "run_dir": "-", "progress": False})


def moved_lanes(model, config):
    """(tokenizer, base, lanes of SEEDS), each with an adapter that does something."""
    base = stage.load_base(model, "checkpoint")
    of = lanes.fresh(base, config.adapter.lora(), config.model, SEEDS)
    return data.load_tokenizer(model), base, of._replace(adapters=jax.tree.map(lambda x: x + 0.05, of.adapters))


def call(verb, *flags):
    """Carries out a script's command in this process.

    Raises:
      SystemExit: with what it says, where it ends with an error.
    """
    cli.call("script", verb, flags)
