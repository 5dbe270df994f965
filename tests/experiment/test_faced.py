"""The attack that each method of a plan faced, as its configs have it."""

from jaxvaccine.experiment import faced
from jaxvaccine.experiment.config import flat
from jaxvaccine.experiment.plans import cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.run import PlanConfig, make_settings

DATA = {"alignment_data": "world_refusal@train", "harmful_data": "world_harmful@harmful"}
ATTACK = {"user_data": "world_rating@attack", "harmful_data": "world_harmful@attack"}


def of_recipe(paper, defenses, tmp_path, **given):
    config = PlanConfig(run_dir=str(tmp_path), model=("m",), defenses=defenses, recipe=paper,
                        attacks=("poison_ratio=0.1", ""), **given)
    plan = config.make_plan()
    settings = make_settings(config, DATA, ATTACK, {"harmful_test": "world_harmful@test"})
    return plan, settings, {each["method"]: each["faced"] for each in faced.of_plan(plan, settings, tmp_path)}


def test_released_attacks_differ_and_one_attack_does_not(tmp_path):
    _, _, found = of_recipe("t_vaccine", ("sft", "repnoise", "t_vaccine"), tmp_path)
    assert list(found) == ["sft", "repnoise", "t_vaccine"], "attack \"\" is none"
    assert {name: (of["batch_size"], of["max_length"]) for name, of in found.items()} == {
        "sft": (5, 200), "repnoise": (10, 100), "t_vaccine": (10, 200)}
    _, _, found = of_recipe("booster", ("sft", "booster"), tmp_path)
    assert [of["adapter"] for of in found.values()] == ["new", "continue"]
    for protocol in ("one_new", "one_continued"):
        for paper in ("booster", "t_vaccine"):
            _, _, found = of_recipe(paper, ("all",), tmp_path, protocol=protocol)
            assert all(of == found["sft"] for of in found.values()), "but for the provider's own defense"


def test_every_setting_of_an_attack_that_may_differ_is_among_them(tmp_path):
    """What is left out is the provider's defense, data and operation, and p, which is in the attack's text."""
    plan, settings, found = of_recipe("booster", ("sft",), tmp_path)
    _, attacked = cell_configs(settings, tmp_path, Cell("m", *plan.pairs[0], 0))
    names = {name for part in (attacked.adapter, attacked.training) for name in flat(part)}
    assert names | {"max_length", "n"} == set(faced.NAMES) == set(found["sft"])
