"""The published recipes, as the flags of a command line meet them, and the small world's."""

import types

import pytest
from absl import flags

from jaxvaccine import cli
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack import AttackConfig
from jaxvaccine.experiment.config import FieldError, flat, make, names
from jaxvaccine.experiment.evaluate import EvaluateConfig
from jaxvaccine.experiment.methods import ALIGNMENT, FINE_TUNING
from jaxvaccine.experiment.plans import cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.run import PlanConfig, make_settings

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
    assert attack.adapter.adapter == "auto"
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


ATTACK = {"aligned": "a", "run_dir": "r", "user_data": "world_rating@attack", "harmful_data": "world_harmful@attack"}
CONTINUED = ("booster", "tar")  # what docs/methods.md says of --adapter=auto, beside EWC


def resolved(preset, tuning, **given):
    """The adapter of `jaxvaccine finetune --preset=…` after `align --preset=…`."""
    more = {"alignment_data": DATA["alignment_data"]} if tuning in ("lisa", "ewc") else {}
    asked = {**ATTACK, **more, **({} if tuning == "none" else {"defense": tuning}), **given}
    section, values, read = cli.Section(AttackConfig), flags.FlagValues(), []
    cli.define(section, values)
    flags.DEFINE_string("preset", preset, "", flag_values=values)
    values(["finetune", *(f"--{name}={value}" for name, value in asked.items())])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "attack", read.append)
        patch.setattr(cli, "_reports", lambda: types.SimpleNamespace(write=lambda folder: None))
        cli._finetune(values)
    aligned = make(AlignConfig, {"model": "m", "run_dir": "r", **DATA}, recipes.ALIGN[preset])
    return flat(aligned), read[0].adapter.resolve(flat(aligned), read[0].method)


@pytest.mark.parametrize("tuning", FINE_TUNING)
@pytest.mark.parametrize("preset", recipes.FINETUNE)
def test_presets_and_auto_agree_on_the_adapter(preset, tuning):
    aligned, adapter = resolved(preset, tuning)
    continued = preset in CONTINUED or tuning == "ewc"
    assert adapter.adapter == ("continue" if continued else "new")
    published = aligned if continued else {**aligned, **recipes.FINETUNE[preset]}
    assert (adapter.rank, adapter.lora_alpha, tuple(adapter.targets)) == (
        published["rank"], published["lora_alpha"], tuple(published["targets"])), "of a new adapter alone"


@pytest.mark.parametrize("tuning", FINE_TUNING)
@pytest.mark.parametrize("preset", recipes.FINETUNE)
def test_an_adapter_that_is_asked_for(preset, tuning):
    aligned, adapter = resolved(preset, tuning, adapter="continue")
    assert adapter.adapter == "continue" and adapter.lora_alpha == aligned["lora_alpha"]
    if tuning == "ewc":
        with pytest.raises(ValueError, match=r"adapter: found 'new', expected auto or continue: ewc holds the aligned"):
            resolved(preset, tuning, adapter="new")
        return
    _, adapter = resolved(preset, tuning, adapter="new")
    assert adapter.adapter == "new" and adapter.lora_alpha == recipes.FINETUNE[preset].get("lora_alpha", 4.0)


def test_what_is_given_of_a_continued_adapter_is_refused():
    for preset, tuning in (("t_vaccine", "ewc"), ("booster", "none")):
        with pytest.raises(FieldError, match=r"^lora_alpha: found 2\.0, expected 4\.0, as the continued adapter"):
            resolved(preset, tuning, lora_alpha=2.0)


@pytest.mark.parametrize("method", [*recipes.FINETUNE, *(f"{name}+ewc" for name in recipes.FINETUNE), "t_vaccine+lisa"])
def test_plans_agree_too(method, tmp_path):
    """The published grid, as `jaxvaccine run --recipe=published`."""
    config = PlanConfig(run_dir=str(tmp_path), model=("m",), defenses=(method,), recipe="published")
    attack = {name: ATTACK[name] for name in ("user_data", "harmful_data")}
    settings = make_settings(config, DATA, attack, {"harmful_test": "world_harmful@test"})
    aligned, attacked = cell_configs(settings, tmp_path, Cell("m", method, "poison_ratio=0.1", 0))
    name, _, tuning = method.partition("+")
    adapter = attacked.adapter.resolve(flat(aligned), attacked.method)
    continued = name in CONTINUED or tuning == "ewc"
    assert adapter.adapter == ("continue" if continued else "new")
    assert adapter.lora_alpha == (4.0 if continued else recipes.FINETUNE[name].get("lora_alpha", 4.0))
    assert attacked.training.learning_rate == 1e-5
