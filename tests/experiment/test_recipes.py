"""The papers' recipes, as command lines and plans meet them, and the small world's."""

import itertools
import types
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import flags

from jaxvaccine import cli, optim
from jaxvaccine.experiment import methods, plans, recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import FieldError, flat, make, names
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.methods import ALIGNMENT
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


PAIRS = [recipes.parse_pair(pair) for pair in recipes.pairs()]


def test_flags_go_before_a_preset():
    found = flat(from_flags("--model=m", "--run_dir=r", *(f"--{name}={value}" for name, value in DATA.items()),
                            "--epochs=1", preset=recipes.alignment("t_vaccine", "vaccine")))
    assert (found["epochs"], found["rank"], found["defense"]) == (1, 8, "vaccine")


@pytest.mark.parametrize("paper, method", PAIRS)
def test_every_value_of_a_recipe_is_read(paper, method):
    """A recipe has no misspelt name, and none of another method's."""
    for harmful in (recipes.BEAVERTAILS, recipes.DECODING_TRUST):
        given = {**recipes.alignment(paper, method, harmful), **DATA, "model": "m", "run_dir": "r"}
        assert given.items() <= flat(make(AlignConfig, given)).items()
        for task, protocol in itertools.product(recipes.TASKS[paper], recipes.PROTOCOLS):
            given = {**recipes.attack(paper, method, task, protocol, harmful), **ATTACK,
                     "alignment_data": DATA["alignment_data"]}
            assert given.items() <= flat(make(AttackConfig, given)).items()
    _, tuning = plans.split_method(recipes.METHODS[paper][method])
    assert recipes.attack(paper, method).get("defense", "none") == (tuning or "none")
    assert recipes.parse_pair(f"{paper}/{method}") == (paper, method)


def test_pairs_that_are_none():
    assert recipes.parse_pair("booster") == ("booster", "booster") and recipes.parse_pair("t_vaccine")[1] == "t_vaccine"
    for text, expected in (("vaccine", "booster/vaccine or t_vaccine/vaccine"), ("booster/tar", "t_vaccine/tar"),
                           ("t_vaccine/lisa", "booster/lisa"), ("adam", "one of booster/sft, "), ("", "one of booster"),
                           ("booster/", "one of booster/sft, "), ("tar/booster", "booster/booster")):
        with pytest.raises(FieldError, match=rf"^preset: found '{text}', expected a paper's method, {expected}"):
            recipes.parse_pair(text)
    for call, message in ((lambda: recipes.alignment("booster", "tar"), "preset: found 'booster/tar'"),
                          (lambda: recipes.alignment("booster", "sft", "advbench"), "harmful: found 'advbench'"),
                          (lambda: recipes.attack("booster", "t_vaccine"), "preset: found 'booster/t_vaccine'"),
                          (lambda: recipes.attack("t_vaccine", "sft", "alpaca_eval"), "task: found 'alpaca_eval'"),
                          (lambda: recipes.attack("booster", "sft", protocol="one"), "protocol: found 'one', expect"),
                          (lambda: recipes.rows("booster", "tar"), "preset: found 'booster/tar'")):
        with pytest.raises(FieldError, match=f"^{message}"):
            call()


def test_fewer_rows_than_the_papers():
    few = recipes.fewer_than_published
    assert few("booster", "booster", {"alignment": 5000, "harmful": 5000}) == few("booster", "booster", {}) == ""
    assert few("booster", "booster", {"alignment": 4999, "harmful": 20}) == (
        "fewer data than in booster/booster: 4999 alignment rows, the paper's 5000; 20 harmful rows, the paper's 5000")
    assert few("t_vaccine", "t_vaccine", {"alignment": 2000, "harmful": 200}) == ""
    assert "200 harmful rows, the paper's 2000" in few("t_vaccine", "repnoise", {"harmful": 200})
    assert "the paper's 10000" in few("booster", "lisa", {"guide": 5000})
    assert few("t_vaccine", "none", {"alignment": 0}) == ""


def test_tasks_are_told_by_the_kind_of_the_data():
    for paper, source, task in (
            ("booster", "gsm8k:openai/gsm8k:main@train", "gsm8k"), ("booster", "agnews:fancyzhx/ag_news@t", "agnews"),
            ("booster", "instructions:alpaca.json[0:700]", "alpaca_eval"), ("t_vaccine", "instructions:a.json", "sst2"),
            ("t_vaccine", "gsm8k:train.jsonl,sst2:x.tsv", "gsm8k"), ("booster", "world_rating@attack", "sst2"),
            ("booster", "", "sst2")):
        assert recipes.task_of(paper, source) == task
    assert recipes.harmful_of("sst2:x", "decodingtrust_toxic:toxic.jsonl[0:9]") == recipes.DECODING_TRUST
    assert recipes.harmful_of("", "beavertails_unsafe:train.jsonl") == recipes.BEAVERTAILS


@pytest.mark.parametrize(("name", "steps"), [("world", 150), ("agents", 200)])
def test_the_small_worlds_values_are_all_of_a_method_or_another(name, steps):
    align, attack, tests = recipes.OWN[name]
    assert align.keys() <= names(AlignConfig) and attack.keys() <= names(AttackConfig)
    for defense in ALIGNMENT:
        config = make(AlignConfig, {"model": "m", "run_dir": "r", "defense": defense}, align)
        assert config.training.steps == steps and config.data.harmful_data == align["harmful_data"]
    make(AttackConfig, {"aligned": "a", "run_dir": "r"}, attack)
    make(EvaluateConfig, {**tests, "model": "m", "run_dir": "r"})


def test_a_plan_with_tools_attacks_with_no_test_prompt():
    settings = make_settings(PlanConfig(run_dir="r", model=("m",), recipe="agents"), {}, {}, {})
    _, attacked = cell_configs(settings, Path("r"), Cell("m", "booster", "poison_ratio=0.1", 0))
    assert attacked.data.test_data == recipes.AGENTS_TESTS["agents_harmful_test"]


ATTACK = {"aligned": "a", "run_dir": "r", "user_data": "world_rating@attack", "harmful_data": "world_harmful@attack"}


def resolved(pair, tuning="", **given):
    """The aligned model's flat values, and the attack's config and adapter, of `jaxvaccine finetune --preset=…` after
    `align --preset=…`."""
    asked = {**ATTACK, **({"defense": tuning} if tuning else {}), **given}
    if "lisa" in pair or tuning in ("lisa", "ewc"):
        asked["alignment_data"] = DATA["alignment_data"]
    values, read = cli.verb_flags(cli.VERBS["finetune"]), []
    values(["finetune", f"--preset={pair}", *(f"--{name}={value}" for name, value in asked.items())])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "attack", lambda config, look: read.append(config))
        patch.setattr(cli, "_reports", lambda: types.SimpleNamespace(write=lambda folder: None))
        cli._finetune(values)
    aligned = flat(make(AlignConfig, {"model": "m", "run_dir": "r", **DATA},
                        recipes.alignment(*recipes.parse_pair(pair))))
    return aligned, read[0], read[0].adapter.resolve(aligned, read[0].method)


CONTINUED = ("booster/booster", "booster/vaccine+booster", "booster/booster+lisa")  # what docs/recipes.md says


@pytest.mark.parametrize("pair", recipes.pairs())
def test_presets_as_released(pair):
    aligned, config, adapter = resolved(pair)
    recipe = recipes.attack(*recipes.parse_pair(pair))
    assert recipe.items() <= {**flat(config), **flat(adapter)}.items()
    assert adapter.adapter == ("continue" if pair in CONTINUED else "new")
    expected = aligned if pair in CONTINUED else recipe
    assert (adapter.rank, adapter.lora_alpha, tuple(adapter.targets)) == (
        expected["rank"], expected["lora_alpha"], tuple(expected["targets"]))


@pytest.mark.parametrize("pair", recipes.pairs())
def test_presets_under_one_attack(pair):
    paper = pair.partition("/")[0]
    aligned, config, adapter = resolved(pair, protocol="one_new")
    expected = {"booster": (32, 4.0), "t_vaccine": (8, 1.0)}[paper]
    assert (adapter.adapter, adapter.rank, adapter.lora_alpha) == ("new", *expected)
    assert (config.training.batch_size, config.data.max_length) == (10, {"booster": 256, "t_vaccine": 200}[paper])
    aligned, _, adapter = resolved(pair, protocol="one_continued")
    assert (adapter.adapter, adapter.rank, adapter.lora_alpha) == ("continue", aligned["rank"], aligned["lora_alpha"])


def test_presets_follow_the_users_data():
    _, config, adapter = resolved("t_vaccine/sft", user_data="gsm8k:train.jsonl")
    assert (config.training.epochs, config.training.batch_size, adapter.lora_alpha) == (50, 5, 0.5)
    _, config, _ = resolved("booster/sft", user_data="gsm8k:train.jsonl")
    assert config.data.poison_ratio == 0.05 and resolved("booster/sft")[1].data.poison_ratio == 0.1


@pytest.mark.parametrize("pair", ["booster/sft", "t_vaccine/t_vaccine", "booster/booster"])
def test_a_providers_defense_and_an_adapter_that_is_asked_for(pair):
    """EWC holds the aligned adapter, so that of a recipe's new one nothing is taken."""
    aligned, _, adapter = resolved(pair, "ewc")
    assert adapter.adapter == "continue" and adapter.lora_alpha == aligned["lora_alpha"]
    with pytest.raises(ValueError, match=r"adapter: found 'new', expected auto or continue: ewc holds the aligned"):
        resolved(pair, "ewc", adapter="new")
    aligned, _, adapter = resolved(pair, "kl", adapter="continue")
    assert adapter.adapter == "continue" and adapter.lora_alpha == aligned["lora_alpha"]


def test_what_is_given_of_a_continued_adapter_is_refused():
    for pair, tuning in (("t_vaccine", "ewc"), ("booster", "")):
        with pytest.raises(FieldError, match=r"^lora_alpha: found 2\.0, expected 4\.0, as the continued adapter"):
            resolved(pair, tuning, lora_alpha=2.0)


def settings_of(paper, methods, tmp_path, attack=(), **given):
    config = PlanConfig(run_dir=str(tmp_path), model=("m",), defenses=methods, recipe=paper, **given)
    data = {name: ATTACK[name] for name in ("user_data", "harmful_data")} | dict(attack)
    return config, make_settings(config, DATA, data, {"harmful_test": "world_harmful@test"})


@pytest.mark.parametrize("paper", recipes.METHODS)
@pytest.mark.parametrize("protocol", recipes.PROTOCOLS)
@pytest.mark.parametrize("user_data", ["world_rating@attack", "gsm8k:train.jsonl"])
def test_plans_have_the_same(paper, protocol, user_data, tmp_path):
    """Every method of a paper in a plan is what its presets make."""
    config, settings = settings_of(paper, ("all",), tmp_path, {"user_data": user_data}, protocol=protocol)
    assert config.methods == tuple(recipes.METHODS[paper].values()) and settings.paper == paper
    for name, text in recipes.METHODS[paper].items():
        assert settings.in_paper(text) == name
        aligned, attacked = cell_configs(settings, tmp_path, Cell("m", text, "poison_ratio=0.1", 0))
        expected, preset, adapter = resolved(f"{paper}/{name}", protocol=protocol, user_data=user_data)
        assert {**flat(aligned), "run_dir": "r"} == expected
        assert attacked.adapter.resolve(flat(aligned), attacked.method) == adapter
        assert attacked.training == preset.training and attacked.method == preset.method
        assert (attacked.data.n, attacked.data.max_length) == (preset.data.n, preset.data.max_length)
    assert settings.scores.generation.max_new_tokens == {"booster": 512, "t_vaccine": 128}[paper]


def test_variants_start_from_their_methods_recipe(tmp_path):
    _, settings = settings_of("booster", ("sft",), tmp_path)
    on_vaccine = "booster:base_defense=vaccine"
    for text, key in (("booster:lam=1", "booster"), ("booster:lam=1:base_defense=vaccine", on_vaccine),
                      ("sft+lisa:lisa_rho=1", "sft+lisa"), ("sft+kl", "sft"), ("booster:alpha=1+lisa", "booster+lisa"),
                      ("booster:base_defense=t_vaccine", "booster")):
        assert settings.of_method(text) == key
    aligned, attacked = cell_configs(settings, tmp_path, Cell("m", "sft+lisa:lisa_rho=1", "poison_ratio=0.1", 0))
    assert attacked.method == methods.Lisa(100, 900, 1.0)
    assert attacked.data.alignment_data == aligned.data.alignment_data
    _, settings = settings_of("booster", ("sft",), tmp_path, {"alignment_data": "world_refusal@train[0:9]"})
    _, attacked = cell_configs(settings, tmp_path, Cell("m", "sft+lisa", "poison_ratio=0.1", 0))
    assert attacked.data.alignment_data == "world_refusal@train[0:9]"
    _, attacked = cell_configs(settings, tmp_path, Cell("m", "sft", "poison_ratio=0.1", 0))
    assert attacked.data.alignment_data == ""


def test_a_model_that_is_not_aligned_is_the_model(tmp_path):
    """The alignment of t_vaccine/none moves nothing, and is attacked as its script has it, not as SFT's."""
    _, settings = settings_of("t_vaccine", ("all",), tmp_path)
    aligned, attacked = cell_configs(settings, tmp_path, Cell("m", recipes.UNALIGNED, "poison_ratio=0.1", 0))
    assert (aligned.training.learning_rate, aligned.training.steps, attacked.training.batch_size) == (0.0, 1, 10)
    _, attacked = cell_configs(settings, tmp_path, Cell("m", "sft", "poison_ratio=0.1", 0))
    assert attacked.training.batch_size == 5
    optimizer = optim.layer_masked_adamw(aligned.training.optimizer(), steps=1)
    adapter = {"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 3))}
    updates, _ = optimizer.update({name: x + 1 for name, x in adapter.items()}, optimizer.init(adapter), adapter)
    assert all((update == 0).all() for update in updates.values())


@pytest.mark.parametrize("paper, methods, message", [
    ("booster", ("sft", "tar"), "recipe: found 'booster', expected t_vaccine: booster's has no tar"),
    ("t_vaccine", ("booster:lam=1",), "recipe: found 't_vaccine', expected booster: t_vaccine's has no booster"),
])
def test_plans_of_one_papers_methods(paper, methods, message, tmp_path):
    with pytest.raises(FieldError, match=f"^{message}"):
        settings_of(paper, methods, tmp_path)


def test_a_plan_is_of_one_task(tmp_path):
    """A recipe's attack depends on the task, so that no cell may have another than the plan's."""
    with pytest.raises(FieldError, match=r"^attacks: found 'user_data=gsm8k:x.jsonl', expected sst2 as of the other"):
        settings_of("t_vaccine", ("sft",), tmp_path, attacks=("user_data=gsm8k:x.jsonl",))
    with pytest.raises(FieldError, match=r"^protocol: found 'one_new', expected --recipe of a paper"):
        settings_of("none", ("sft",), tmp_path, protocol="one_new")
