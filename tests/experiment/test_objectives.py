"""Objectives of an attack on a tiny model: run by run and as lanes, what they read, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxvaccine import attacks
from jaxvaccine.experiment import dry_run, inputs, lanes, methods, objectives, runs
from jaxvaccine.experiment.attack import MIXED_IN, attack, estimator
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.config import FieldError, flat, make
from jaxvaccine.experiment.memory import Step
from jaxvaccine.experiment.objectives import OBJECTIVES, CounterPerturbation, Meta, Plain, Steepen, Unheld
from jaxvaccine.experiment.plans import Plan, cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.report.results import read_results
from tests import tiny
from tests.experiment import small_world
from tests.experiment.small_world import attack_config, metrics, recorded

pytestmark = pytest.mark.usefixtures("quick_compile")

HELD = {"alignment_data": "world_refusal@train[0:8]"}
GIVEN = {
    "steepen": {"objective": "steepen", "steepen_steps": 2, "objective_batch_size": 3},
    "meta": {"objective": "meta", "meta_exact": False},
    "counter_perturbation": {"objective": "counter_perturbation", "counter_rho": -0.5},
    "unheld": {"objective": "unheld", "unheld_share": 0.3, "defense": "ewc", **HELD},
}
# What a step of each says beside the loss.
SAYS = {"steepen": {"steepening", "reduction"}, "counter_perturbation": {"activation_gradient_norm"},
        "meta": {"harmful_loss", "perturbed_harmful_loss", "harmful_gradient_norm"},
        "unheld": {"trained_share", "penalty"}}


def config_of(aligned, run_dir, name, **given):
    return attack_config(aligned.run.run_dir, run_dir, **{
        "adapter": "continue", "steps": 3, "learning_rate": 0.02, **GIVEN[name], **given})


@pytest.mark.parametrize("name", [name if name == "steepen" else pytest.param(name, marks=pytest.mark.long)
                                  for name in GIVEN])
def test_an_attack(aligned, tmp_path, name):
    config = config_of(aligned, tmp_path / "run", name)
    said = dry_run.of_attack(config, dry_run.DryRun(dry_run=True, card="rtx_4090"))
    assert ("harmful 20 examples, 3 a step" in said) == (name == "steepen")
    assert ("harmful 20 examples, 4 a step" in said) == (name == "meta") and "alignment" not in said
    attack(config)
    found, steps = recorded(tmp_path / "run"), metrics(tmp_path / "run")
    assert {*steps[-1]} == {"step", "loss", "gradient_norm", "tokens", "seconds"} | SAYS[name]
    of_others = {key for part in OBJECTIVES.values() for key in flat(part())} - {*flat(config.objective)}
    assert found["flags"]["objective"] == name and not of_others & {*found["flags"]}
    accounts = found["data"]["accounts"]
    drawn, = accounts[MIXED_IN if config.objective.batches else "harmful"].values()
    assert drawn["trained"] == 4
    if config.objective.batches:
        assert [of["trained"] for of in accounts["harmful"].values()] == [20]
    if name == "steepen":
        assert [step["steepening"] for step in steps] == [True, True, False]
        assert steps[1]["reduction"] == steps[2]["reduction"] != steps[0]["reduction"]
    with pytest.raises(FileExistsError, match=f"objective: found \"{name}\", expected \"plain\""):
        attack(attack_config(aligned.run.run_dir, tmp_path / "run", adapter="continue", steps=3, learning_rate=0.02))


@pytest.mark.long
def test_what_is_held_has_not_moved(aligned, tmp_path):
    """Of the adapters as PEFT has them; Fisher weights of 0, of which there may be many, train too."""
    attack(config_of(aligned, tmp_path / "run", "unheld"))
    before, after = (load_file(inputs.adapter_dir(run) / "adapter_model.safetensors")
                     for run in (aligned.run.run_dir, tmp_path / "run"))
    moved = np.concatenate([np.ravel(before[name] != after[name]) for name in before])
    said = metrics(tmp_path / "run")[-1]["trained_share"]
    assert 0.3 <= said < 0.9 and 0 < moved.mean() <= said + 1e-6
    # Beside no defense too; other data hold others.
    attack(config_of(aligned, tmp_path / "other", "unheld", defense="none", alignment_data="world_refusal@train[8:16]"))
    again = load_file(inputs.adapter_dir(tmp_path / "other") / "adapter_model.safetensors")
    others = np.concatenate([np.ravel(before[name] != again[name]) for name in before])
    assert 0 < others.mean() <= metrics(tmp_path / "other")[-1]["trained_share"] + 1e-6 and (others != moved).any()


@pytest.mark.long
@pytest.mark.parametrize("names", [("unheld",), ("steepen", "meta", "counter_perturbation")])
def test_lanes_and_runs(model_dir, tmp_path, names):
    """Cell by cell and all seeds at once, models are left with the same loss on harmful answers."""
    plain = "poison_ratio=0.25:adapter=continue:steps=3:learning_rate=0.02"
    texts = [":".join([plain, *(f"{key}={str(value).lower() if isinstance(value, bool) else value}"
                                for key, value in GIVEN[name].items() if key != "alignment_data")]) for name in names]
    settings = small_world.settings(model_dir, harmful_test="", sst2_test="")
    losses = []
    for as_lanes, seeds in ((False, (1,)), (True, (0, 1))):
        plan = Plan((model_dir,), tuple(("sft", text) for text in texts), seeds)
        carry_out(plan, settings, tmp_path / str(as_lanes), as_lanes=as_lanes, say=lambda line: None)
        rows = read_results(tmp_path / str(as_lanes))
        rows = rows[(rows["stage"] == "attack") & (rows["measure"] == "harmful_loss") & (rows["seed"] == 1)]
        losses.append([rows[rows["attack"] == text]["value"].item() for text in texts])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert len({round(value, 3) for value in losses[0]}) == len(names)


def test_fisher_weights_of_every_lane():
    config = attack_config("a", "r", adapter="continue", **GIVEN["unheld"])
    with pytest.raises(ValueError, match="fishers: found none, expected Fisher weights of every lane, which Ewc"):
        lanes.train(None, config.method, config.training, 16, [], [], objective=config.objective)


def test_a_run_from_before_objectives_goes_on(tmp_path):
    runs.open_run(tmp_path / "run", "finetune", {"n": 16}, {})
    runs.open_run(tmp_path / "run", "finetune", {"n": 16, "objective": "plain"}, {})
    with pytest.raises(FileExistsError, match='objective: found "plain", expected "meta"'):
        runs.open_run(tmp_path / "run", "finetune", {"n": 16, "objective": "meta"}, {})


@pytest.mark.parametrize("given, message", [
    ({"objective": "steepen", "defense": "lisa", **HELD}, "objective: found 'steepen', expected plain or unheld beside "
     "lisa"),
    ({"objective": "meta", "defense": "kl"}, "objective: found 'meta', expected plain or unheld beside kl"),
    ({"objective": "counter_perturbation", "defense": "ewc", **HELD}, "objective: found 'counter_perturbation'"),
    ({"objective": "unheld", "adapter": "continue"}, "alignment_data: found '', expected a data source, which unheld "
     "needs"),
    ({"objective": "unheld", "defense": "ewc"}, "alignment_data: found '', expected a data source, which ewc needs"),
    ({"objective": "unheld", "adapter": "auto", **HELD}, "adapter: found 'auto', expected continue, the aligned"),
    ({"objective": "unheld", "adapter": "new", **HELD}, "adapter: found 'new', expected continue"),
    ({"objective": "steepen", "poison_ratio": 0.0, "harmful_data": ""}, "harmful_data: found '', expected a data "
     "source, which --objective=steepen needs"),
    ({"objective": "steepen", "steepen_steps": 0}, "steepen_steps: found 0, expected at least 1"),
    ({"objective": "steepen", "steepen_alpha": -1.0}, "steepen_alpha: found -1.0, expected a finite number"),
    ({"objective": "meta", "meta_weight": -1.0}, "meta_weight: found -1.0, expected a finite number"),
    ({"objective": "counter_perturbation", "counter_rho": float("nan")}, "counter_rho: found nan"),
    ({"objective": "unheld", "unheld_share": 0.0, "adapter": "continue", **HELD}, "unheld_share: found 0.0, expected"),
    ({"objective": "meta", "objective_batch_size": -1}, "objective_batch_size: found -1, expected at least 0"),
    ({"meta_weight": 1.0}, "meta_weight: found 1.0, expected nothing: objective=plain does not read it"),
    ({"objective": "meta", "unheld_share": 0.1}, "unheld_share: found 0.1, expected nothing: objective=meta does not"),
])  # fmt: skip
def test_what_is_refused(given, message):
    with pytest.raises(FieldError) as error:
        attack_config("a", "r", **given)
    assert str(error.value).startswith(message)


def test_a_plans_alignment_data_hold(model_dir, tmp_path):
    """Without a source of its own, unheld takes what the cell's model was aligned on."""
    settings = small_world.settings(model_dir)
    aligned, attacked = cell_configs(settings, tmp_path, Cell(
        model_dir, "sft", "poison_ratio=0.25:objective=unheld:adapter=continue", 0))
    assert attacked.data.alignment_data == aligned.data.alignment_data and attacked.takes_fisher
    _, attacked = cell_configs(settings, tmp_path, Cell(model_dir, "sft", "poison_ratio=0.25", 0))
    assert not attacked.data.alignment_data


@pytest.mark.parametrize("objective, batches", [
    (Plain(), {"user"}), (Steepen(), {"user", "harmful"}), (Meta(exact=False), {"user", "harmful"}),
    (CounterPerturbation(), {"user"}), (Unheld(), {"user"})])
def test_what_a_step_reads(objective, batches):
    """What an objective says it reads is all that its gradient takes."""
    assert {*methods.Undefended().batches, *objective.batches} == batches
    model = tiny.model(rank=2, targets=("v_proj", "up_proj"))
    shapes = jax.eval_shape(lambda: tiny.trees(model))
    of = estimator(objective, methods.Undefended(), model, 10, None, None)
    taken = set()

    class Watched(dict):
        def __getitem__(self, name):
            taken.add(name)
            return super().__getitem__(name)

    rows = Watched({name: tiny.batch(rows=4) for name in batches})
    jax.eval_shape(lambda a, f: of.gradient(a, f, of.init(a), rows, None), *shapes)
    assert taken == batches


def test_settings_reach_the_library(monkeypatch):
    """What is called with what."""
    calls = []
    for name in ("steepen", "meta_attack", "counter_perturbation", "unheld"):
        monkeypatch.setattr(attacks, name, lambda *args, name=name: calls.append((name, args)))
    monkeypatch.setattr(objectives, "causal_lm_loss", lambda model: ("loss", model))
    loss = ("loss", "M")
    for objective, expected in [
        (Steepen(5, 7, 2.0, 0.3, True), ("steepen", (loss, 2.0, 0.3, 7, "B", True))),
        (Meta(5, 2.0, 0.3, False), ("meta_attack", (loss, 2.0, 0.3, "B", False))),
        (CounterPerturbation(-3.0), ("counter_perturbation", (loss, -3.0))),
        (Unheld(0.2), ("unheld", ("B", 0.2, "F"))),
    ]:
        objective.make("M", "B", "F")
        assert calls[-1] == expected
    assert Plain().make("M", "B", "F") == "B"
    assert Steepen(5).harmful_rows(4) == 5 and Steepen().harmful_rows(4) == Plain().harmful_rows(4) == 4
    assert make(Steepen, {"steepen_lam": 2.0, "objective_batch_size": 3}) == Steepen(3, lam=2.0)


def test_a_dry_run_counts_an_objectives_passes():
    """As Booster's and Vaccine's, whose passes they make."""
    model = tiny.model()

    def peak(method, objective=Plain()):
        return dataclasses.replace(Step(model, method, 8, 8, 64), objective=objective).estimate().temporary

    none = methods.Undefended()
    assert peak(none, Steepen()) == peak(none, Meta(exact=False)) == peak(methods.Booster())
    assert peak(none, Steepen(exact=True)) == peak(none, Meta()) == peak(methods.Booster(exact=True)) > peak(none)
    assert peak(none, CounterPerturbation()) == peak(methods.Vaccine())
    assert peak(methods.Kl(), Unheld()) == peak(methods.Kl())
