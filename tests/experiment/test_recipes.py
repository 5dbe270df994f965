"""The published recipes, as the flags of a command line meet them, and the small world's."""

import pytest
from absl import flags

from jaxvaccine import cli
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack import AttackConfig
from jaxvaccine.experiment.config import flat, make, names
from jaxvaccine.experiment.evaluate import EvaluateConfig
from jaxvaccine.experiment.methods import ALIGNMENT

DATA = {"alignment_data": "world_refusal@train", "harmful_data": "world_harmful@harmful"}


def from_flags(*arguments, preset):
    """What `jaxvaccine align` reads."""
    section, values = cli.Section(AlignConfig), flags.FlagValues()
    cli.define(section, values)
    values(["align", *arguments])
    return make(AlignConfig, cli.given(section, values), preset)


@pytest.mark.parametrize("name", ALIGNMENT)
def test_published(name):
    config = from_flags("--model=m", "--run_dir=r", *(f"--{name}={value}" for name, value in DATA.items()),
                        "--epochs=1", preset=recipes.ALIGN[name])
    published = {"booster": (32, 5e-4, "constant", 256), "sft": (32, 5e-4, "constant", 256),
                 "vaccine": (8, 1e-3, "cosine", 200), "t_vaccine": (8, 1e-3, "cosine", 200),
                 "repnoise": (32, 5e-4, "constant", 256), "tar": (8, 1e-3, "cosine", 200)}[name]
    found = flat(config)
    assert (found["rank"], found["learning_rate"], found["schedule"], found["max_length"]) == published
    assert found["defense"] == name and found["weight_decay"] == 0.1
    assert found["batch_size"] == (5 if name == "repnoise" else 10)
    assert found["epochs"] == 1, "a flag that is given goes before the preset"
    if name == "t_vaccine":
        assert (found["rho"], found["layers"], found["sample_every"], found["probe_every"]) == (3.0, 8, 20, 200)
        assert found["harmful_batch_size"] == 1 and found["dropout"] == 0.1
    if name == "booster":
        assert (found["lam"], found["alpha"], found["base_defense"]) == (5.0, 0.1, "sft")
    attack = make(AttackConfig, {"aligned": "a", "run_dir": "r", "user_data": "world_rating@attack",
                                 "harmful_data": "world_harmful@attack"}, recipes.FINETUNE[name])
    assert (attack.training.learning_rate, attack.data.n, attack.data.poison_ratio, attack.training.epochs) == (
        1e-5, 1000, 0.1, 20)
    assert attack.adapter.adapter == ("continue" if name == "booster" else "new")
    assert attack.data.max_length == found["max_length"], "the attack reads as much of a row as the alignment"


@pytest.mark.parametrize("name", ALIGNMENT)
def test_every_value_of_a_recipe_is_read(name):
    """A recipe has no misspelt name, and none of another method's."""
    given = {**recipes.ALIGN[name], **DATA, "model": "m", "run_dir": "r"}
    assert given.items() <= flat(make(AlignConfig, given)).items()
    given = {**recipes.FINETUNE[name], "aligned": "a", "run_dir": "r", "user_data": "world_rating@attack",
             "harmful_data": "world_harmful@attack"}
    assert given.items() <= flat(make(AttackConfig, given)).items()


def test_the_small_worlds_values_are_all_of_a_method_or_another():
    assert recipes.WORLD_ALIGN.keys() <= names(AlignConfig) and recipes.WORLD_ATTACK.keys() <= names(AttackConfig)
    for name in ALIGNMENT:
        config = make(AlignConfig, {"model": "m", "run_dir": "r", "defense": name}, recipes.WORLD_ALIGN)
        assert config.training.steps == 150 and config.data.harmful_data == recipes.WORLD_ALIGN["harmful_data"]
    make(AttackConfig, {"aligned": "a", "run_dir": "r"}, recipes.WORLD_ATTACK)
    make(EvaluateConfig, {**recipes.WORLD_TESTS, "model": "m", "run_dir": "r"})
