"""Configs from flat values and back, and what is said to values that do not fit."""

import dataclasses
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.experiment import config, methods
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.objectives import OBJECTIVES
from jaxvaccine.llama_config import TARGETS

SOURCES = ("world_refusal@train{not category=amber;dune}[0:8]", "sst2:stanfordnlp/sst2@train[:10],world_rating@more",
           "agnews:news.tsv")
# What a config has to be given. An evaluation's model is given or not together with `trained` and `answers`,
# AlpacaEval's data needs another judge, and chat_api an environment; candidates are given or not together with
# `user_rows`; an adapter that an alignment trains on is that of a `start`; tests with tools have no `stop`.
REQUIRED = {
    AlignConfig: {"model": "m", "start": "s", "run_dir": "r", "alignment_data": SOURCES[0], "harmful_data": SOURCES[0]},
    AttackConfig: {"aligned": "a", "run_dir": "r", "user_data": SOURCES[0], "harmful_data": SOURCES[0],
                   "alignment_data": SOURCES[0]},
    EvaluateConfig: {"model": "m", "run_dir": "r", "harmful_test": SOURCES[0], "judge": "keyword"},
}
# Switches, and what has to stay at its default where they are on.
NOT_TOGETHER = {"exact": "last_term", "merge_adapter": "quantisation"}
CHOICES = ("defense", "base_defense", "objective", "ablate")
FIXED = {"trained", "model", "answers", "start", "alpaca_eval_test", "judge", "judge_options", "user_rows",
         "candidates", "stop"}


def values_of(setting):
    """A strategy for valid values of a setting."""
    if typing.get_origin(setting.hint) is typing.Literal:
        return st.sampled_from(typing.get_args(setting.hint))
    if setting.name == "only_layers":
        return (st.lists(st.integers(0, 40).map(str), min_size=1, max_size=3).map(tuple)
                | st.sampled_from([("frozen",), ("rarest:3",)]))
    if setting.name == "n":  # so many that of any poison_ratio at least one is harmful
        return st.integers(1000, 5000)
    if setting.name == "targets":
        return st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple)
    if setting.name == "stop":
        return st.lists(st.text("abcz/._-=:", min_size=1), min_size=1, max_size=2).map(tuple)
    if setting.name.endswith(("_data", "_test")):
        return st.sampled_from(SOURCES)
    return {int: st.integers(1, 5000), float: st.floats(0.001, 0.999), bool: st.booleans(),
            str: st.text("abcz/._-=:", min_size=1)}[setting.hint]


@st.composite
def stages(draw):
    """(config class, flat values that it reads)."""
    config_class = draw(st.sampled_from(list(REQUIRED)))
    every = {s.name: s for s in config.settings(config_class) if s.name not in FIXED}
    chosen = {s.name: draw(values_of(s)) for s in every.values() if s.name in CHOICES}
    if chosen.get("defense") != "booster":
        chosen.pop("base_defense", None)
    if chosen.get("ablate", "none") != "none":
        chosen["harmless_data"] = SOURCES[0]
    objective = OBJECTIVES[chosen.get("objective", "plain")]
    chosen |= {"defense": "none"} if objective.alone else {"adapter": "continue"} if objective.takes_fisher else {}
    chosen |= {"trains": "adapter"} if chosen.get("objective", "plain") != "plain" else {}
    read = sorted(config.flat(config.make(config_class, {**REQUIRED[config_class], **chosen})))
    names = draw(st.lists(st.sampled_from(sorted({*read} & {*every} - {*chosen})), unique=True, max_size=8))
    drawn = {name: draw(values_of(every[name])) for name in names}
    for name, other in NOT_TOGETHER.items():
        if drawn.get(name):
            drawn.pop(other, None)
    return config_class, {**REQUIRED[config_class], **chosen, **drawn}


@settings(max_examples=300)
@given(stages())
def test_flat_values_and_back(stage):
    config_class, values = stage
    made = config.make(config_class, values)
    found = config.flat(made)
    assert values.items() <= found.items()
    assert config.make(config_class, found) == made and found.get("judge") != "auto"
    assert config.make(config_class, values, {**found, "unknown": 1}) == made, "defaults may have more than is read"
    chosen = {found.get(name) for name in CHOICES} | {None}
    defaults = {s.name: s.default for s in config.settings(config_class) if s.option in chosen}
    assert found.keys() == defaults.keys()
    shared = {"rho", "direction"} if found.get("base_defense") else set()  # has a default a method
    shared.add("judge")  # what stands for auto depends on the prompts
    assert {name: found[name] for name in defaults.keys() - values.keys() - shared} == {
        name: value for name, value in defaults.items() if name not in {*values, *shared}}


def as_text(value):
    """As a plan's text has it."""
    if isinstance(value, tuple):
        return "+".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value).replace(",", "+")


@settings(max_examples=200)
@given(stages())
def test_texts_and_back(stage):
    config_class, values = stage
    assert config.parse(config_class, {name: as_text(value) for name, value in values.items()}) == values


@settings(max_examples=200)
@given(stages(), st.data())
def test_a_change_is_of_what_is_named_alone(stage, data):
    config_class, values = stage
    made = config.make(config_class, values)
    # An objective may need the aligned adapter.
    bound = {*CHOICES, "adapter", "trains", *NOT_TOGETHER, *NOT_TOGETHER.values()} | FIXED
    free = sorted({*config.flat(made)} - bound)
    name = data.draw(st.sampled_from(free))
    value = data.draw(values_of(next(s for s in config.settings(config_class) if s.name == name)))
    changed = config.change(made, **{name: value})
    assert config.flat(changed) == {**config.flat(made), name: value}
    assert type(changed) is config_class and config.change(made) == made


def test_a_newly_chosen_method_starts_from_its_own_defaults():
    made = config.make(AlignConfig, {**REQUIRED[AlignConfig], "defense": "t_vaccine", "rho": 7.0, "rank": 4})
    vaccine = config.change(made, defense="vaccine")
    assert vaccine.method == methods.Vaccine() and vaccine.method.rho == 2.0 and vaccine.adapter.rank == 4
    booster = config.change(made, defense="booster", base_defense="vaccine", lam=1.0)
    assert booster.method == methods.Booster(lam=1.0, base=methods.Vaccine())
    # Another base leaves Booster's own settings.
    assert config.change(booster, base_defense="sft").method == methods.Booster(lam=1.0)
    assert config.change(booster, base_defense="vaccine", rho=3.0).method.base == methods.Vaccine(rho=3.0)


def raised(config_class, values):
    with pytest.raises(FieldError) as error:
        config.make(config_class, {**REQUIRED[config_class], **values})
    assert isinstance(error.value, ValueError) and str(error.value).startswith(f"{error.value.name}: found ")
    return error.value.name, error.value.message


@pytest.mark.parametrize("config_class, values, name, message", [
    (AlignConfig, {"lamb": 1.0}, "lamb", "found 1.0, expected no such field"),
    (AlignConfig, {"rho": 2.0}, "rho", "found 2.0, expected nothing: defense=sft does not read it"),
    (AlignConfig, {"defense": "vaccine", "base_defense": "sft"}, "base_defense",
     "found 'sft', expected nothing: defense=vaccine does not read it"),
    (AlignConfig, {"defense": "booster", "rho": 2.0}, "rho",
     "found 2.0, expected nothing: defense=booster, base_defense=sft does not read it"),
    (AlignConfig, {"defense": "adam"}, "defense", "found 'adam', expected one of sft, vaccine, "),
    (AlignConfig, {"defense": "booster", "base_defense": "booster"}, "base_defense",
     "found 'booster', expected one of sft, "),
    (AlignConfig, {"defense": "t_vaccine", "freeze": "never"}, "freeze", "found 'never', expected one of layer, "),
    (AlignConfig, {"batch_size": 0}, "batch_size", "found 0, expected at least 1"),
    (AlignConfig, {"epochs": 0.0}, "epochs", "found 0.0, expected more than 0"),
    (AlignConfig, {"epochs": float("nan")}, "epochs", "found nan, expected more than 0"),
    (AlignConfig, {"model": "", "start": ""}, "model", "found '', expected a directory"),
    (AttackConfig, {"ewc_lam": 1.0}, "ewc_lam", "found 1.0, expected nothing: defense=none does not read it"),
    (AttackConfig, {"defense": "lisa", "lisa_rho": 1.0, "kl_lam": 1.0}, "kl_lam", "found 1.0, expected nothing"),
    (EvaluateConfig, {"judge": "nobody"}, "judge", "found 'nobody', expected one of auto, keyword, world"),
    (EvaluateConfig, {"trained": "r"}, "model", "found 'm', expected either --model or --trained"),
])  # fmt: skip
def test_what_is_refused(config_class, values, name, message):
    found = raised(config_class, values)
    assert found[0] == name and found[1].startswith(message)


@pytest.mark.parametrize("config_class, texts, name, message", [
    (AlignConfig, {"lamb": "1"}, "lamb", "found '1', expected no such field"),
    (AlignConfig, {"steps": "1.5"}, "steps", "found '1.5', expected a whole number"),
    (AlignConfig, {"lam": "much"}, "lam", "found 'much', expected a number"),
    (AlignConfig, {"exact": "yes"}, "exact", "found 'yes', expected true or false"),
    (AlignConfig, {"draw": ""}, "draw", "found '', expected one of sample, top"),
    (AttackConfig, {"rank": ""}, "rank", "found '', expected a whole number"),
])  # fmt: skip
def test_texts_that_are_no_values(config_class, texts, name, message):
    with pytest.raises(FieldError) as error:
        config.parse(config_class, texts)
    assert (error.value.name, error.value.message) == (name, message)


@pytest.mark.parametrize("config_class", REQUIRED)
def test_every_setting_says_what_it_is(config_class):
    for setting in config.settings(config_class):
        assert setting.help.endswith(".") and len(setting.help) > 9, setting
        assert setting.group and "\n" not in setting.group
    assert config.names(config_class) == {setting.name for setting in config.settings(config_class)}


@pytest.mark.parametrize("config_class", REQUIRED)
def test_configs_are_values(config_class):
    """Frozen, equal if all is equal, usable as keys."""
    made = config.make(config_class, REQUIRED[config_class])
    assert len({made, config.make(config_class, REQUIRED[config_class]), config.change(made, seed=1)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.run = None
