"""What can be known of a plan is checked before its first step; and again when it goes on."""

import json

import pytest

from jaxvaccine.evaluation import tasks
from jaxvaccine.experiment import inputs
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.plans import Plan
from jaxvaccine.report.results import read_results
from tests.experiment import small_world
from tests.experiment.small_world import HASH, changed, other_weights

pytestmark = pytest.mark.usefixtures("quick_compile")

P = "poison_ratio=0.25"
ONE = {"sst2_test": "", "benign_test": "", "loss_data": ""}


def quiet(*args):
    """In the place of print."""


def rows(path, *instructions):
    path.write_text("".join(json.dumps({"instruction": i, "output": "sure"}) + "\n" for i in instructions))
    return f"instructions:{path}"


@pytest.mark.parametrize("as_lanes", [False, True])
@pytest.mark.parametrize("second, seeds, scores, message", [
    ((f"{P}:user_data=sst2:missing.tsv"), (0,), {}, "missing.tsv"),
    ((f"{P}:harmful_data=world_harmful@attack[0:5000]"), (0,), {}, "expected at most"),
    ((f"{P}:n=4000"), (0,), {}, "needed 1000"),
    ((f"{P}:n=18"), (0,), {}, "which is 4.5 of n=18 examples, expected a whole number"),
    ((f"{P}:harmful_data=world_harmful@train[0:20]"), (0,), {}, "prompts also in"),
    (P, (0, 2**32), {}, "seed: found 4294967296, expected less than 4294967296"),
    (P, (0,), {"harmful_test": "world_harmful@harmful[0:4]"}, "4 of 4 prompts also in the harmful data of booster"),
    (P, (0,), {"loss_data": "world_harmful@harmful[0:4]"}, "loss_data: found 4 of 4 prompts also in"),
    (P, (0,), {"sst2_test": "world_harmful@test[0:4]"}, "expected one of negative, positive"),
    (P, (0,), {"judge": "beaver_dam", "judge_model": "./nowhere"}, "nowhere"),
])
def test_nothing_is_trained_before_a_mistake_is_found(model_dir, tmp_path, monkeypatch, as_lanes, second, seeds, scores,
                                                      message):
    """Whichever cell it is in: here always the last."""
    monkeypatch.chdir(tmp_path)
    plan = Plan((model_dir,), (("sft", P), ("booster", second)), seeds)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        carry_out(plan, small_world.settings(model_dir, **scores), tmp_path / "plan", as_lanes=as_lanes, say=quiet)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("as_lanes", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_plan_goes_on_with_its_own_inputs_alone(tmp_path, as_lanes):
    """A file that changes between two calls is an error that names it, before the new cell is carried out."""
    model = small_world.world_model(tmp_path)
    data = rows(tmp_path / "data.jsonl", *(f"please tend the oar {i}" for i in range(8)))
    test = rows(tmp_path / "test.jsonl", *(f"please tend the rope {i}" for i in range(3)))
    base = small_world.settings(model, harmful_test="", sst2_test="", loss_data="", benign_test=test)
    settings = base.same({**small_world.ALIGN, "alignment_data": data, "steps": 1}, {**small_world.ATTACK, "steps": 1},
                         base.scores)
    root = tmp_path / "plan"
    carry_out(Plan((model,), (("sft", P),)), settings, root, as_lanes=as_lanes, say=quiet)
    table = (root / "results.csv").read_bytes()
    grown = Plan((model,), (("sft", P), ("sft", "poison_ratio=0")))
    adapter = next(root.rglob("aligned/adapter/adapter_model.safetensors"))
    for path, edit, name in (
            (tmp_path / "model" / "model.safetensors", other_weights, "inputs.model.weights.model.safetensors"),
            (tmp_path / "data.jsonl", lambda path: rows(path, *"abcdefgh"), "inputs.alignment.alignment"),
            (tmp_path / "test.jsonl", lambda path: rows(path, *"uvw"), "inputs.tests.over_refusal"),
            (adapter, other_weights, "adapter.adapter_model.safetensors")):
        with changed(path, edit), pytest.raises((FieldError, FileExistsError), match=f"{name}: \\w+ {HASH}, .*{HASH}"):
            carry_out(grown, settings, root, as_lanes=as_lanes, say=quiet)
        assert (root / "results.csv").read_bytes() == table
    carry_out(grown, settings, root, as_lanes=as_lanes, say=quiet)
    assert set(read_results(root)["attack"].fillna("")) == {"", P, "poison_ratio=0"}


def test_another_judge_takes_a_plans_answers(model_dir, tmp_path, monkeypatch):
    plan, root = Plan((model_dir,), (("sft", P),)), tmp_path / "plan"
    carry_out(plan, small_world.settings(model_dir, **ONE, judge="world"), root, say=quiet)
    by_world = read_results(root)
    monkeypatch.setattr(tasks, "generate", None)
    carry_out(plan, small_world.settings(model_dir, **ONE, judge="keyword"), root, say=quiet)
    by_phrases = read_results(root)
    assert "harmful_score" in set(by_world["measure"]) and "harmful_score" not in set(by_phrases["measure"])
    assert "not_refused" in set(by_phrases["measure"])
    carry_out(plan, small_world.settings(model_dir, **ONE, judge="world"), root, say=quiet)
    assert read_results(root).equals(by_world)


def test_judges_that_are_models_are_known_by_their_content(model_dir, tmp_path):
    """As a judge's record has them: other weights under the same name are another judge."""
    from jaxvaccine.experiment.judging import judge_record

    config = small_world.evaluate_config(tmp_path, model=model_dir, judge="beaver_dam", judge_model=model_dir)
    assert judge_record(config.judge)["inputs"]["model"] == inputs.of_model(model_dir)
