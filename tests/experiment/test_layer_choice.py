"""An attack on the layers that T-Vaccine's alignment left alone, as a run, and with each seed's own as lanes."""

import json

import jax
import numpy as np
import pytest

from jaxvaccine.checkpoints.peft import load_adapter
from jaxvaccine.experiment import inputs, lane_scores, lanes, layer_choice, stage
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.methods import Booster, Sft, TVaccine
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.plans import Plan
from jaxvaccine.experiment.results import Cell
from jaxvaccine.json_files import read_json
from tests.experiment import small_world

pytestmark = pytest.mark.usefixtures("quick_compile")

METHOD = "t_vaccine:layers=1:sample_every=1:steps=2"
FROZEN, RAREST = (f"poison_ratio=0.25:adapter=continue:steps=1:only_layers={text}" for text in ("frozen", "rarest:1"))
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("layers, active, expected", [
    (None, [0, 0, 0, 0], None), (("3", "0"), None, [0, 3]), (("frozen",), [0, 3, 0, 1], [0, 2]),
    (("rarest:1",), [3, 2, 9, 2], [1]), (("rarest:2",), [3, 2, 9, 2], [1, 3]), (("rarest:3",), [3, 2, 9, 2], [0, 1, 3]),
    (("rarest:4",), [0, 0, 0, 0], [0, 1, 2, 3]), (("rarest:02",), [0, 0, 0, 0], [0, 1])])  # fmt: skip
def test_which_layers(layers, active, expected):
    found = layer_choice.mask(layers, 4, None if active is None else np.array(active))
    assert found is expected is None or layer_choice.numbers(found) == expected


@pytest.mark.parametrize("layers, active, message", [
    (("frozen",), None, "expected numbers: only T-Vaccine's alignment"), (("rarest:1",), None, "expected numbers"),
    (("frozen",), [2, 1, 4], "no layer was frozen in every step of the alignment; they were active in 2, 1, 4 steps"),
    (("rarest:4",), [2, 1, 4], "expected at most rarest:3"), (("3",), [2, 1, 4], "expected numbers below 3")])
def test_layers_that_there_are_not(layers, active, message):
    with pytest.raises(FieldError, match=f"^only_layers: found .*{message}"):
        layer_choice.mask(layers, 3, None if active is None else np.array(active))


@pytest.mark.parametrize("text", ["rarest", "rarest:0", "rarest:-1", "rarest:1.5", "Frozen", "frozen,0"])
def test_texts(text):
    with pytest.raises(FieldError, match=r"^only_layers: found .*expected numbers of at least 0, or frozen, or rar"):
        small_world.attack_config("a", "r", only_layers=tuple(text.split(",")))


def test_what_is_known_before_the_alignment():
    for method in (TVaccine(layers=2), Booster(base=TVaccine(layers=2))):
        layer_choice.check(("frozen",), 3, method)
    layer_choice.check(("rarest:3",), 3, TVaccine(layers=3))
    layer_choice.check(None, 3, Sft())
    for layers, method, message in ((("rarest:4",), TVaccine(), "at most"),
                                    (("frozen",), Booster(), "only T-Vaccine's"),
                                    (("frozen",), TVaccine(layers=3), "the alignment has all 3 layers active"),
                                    (("3",), Sft(), "numbers below 3")):
        with pytest.raises(FieldError, match=message):
            layer_choice.check(layers, 3, method)


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """The folder of a plan whose seeds are lanes, and {attack: the masks that its lanes were trained with}."""
    root, seen, train = tmp_path_factory.mktemp("plans") / "lanes", {}, lanes.train

    def note(start, method, part, bucket, sources, seeds, layers=None, observe=None, progress=False, description="",
             *more):
        found = train(start, method, part, bucket, sources, seeds, layers, observe, progress, description, *more)
        if layers is not None:
            moved = [np.asarray(x != y).any(axis=(2, 3)) for x, y in zip(
                *map(jax.tree.leaves, (found[0].adapters, start.adapters)), strict=True)]
            seen[description.split()[-1]] = layers, moved
        return found

    settings = small_world.settings(model_dir)
    plan = Plan((model_dir,), ((METHOD, FROZEN), (METHOD, RAREST)), SEEDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "train", note)
        patch.setattr(lane_scores.Scorer, "__call__", lambda self, of, seeds: (
            [{"harmful_loss": {"loss": 1.0, "n": 1}} for _ in seeds], {}))
        carry_out(plan, settings, root, as_lanes=True, say=lambda text: None)
    return root, seen


@pytest.mark.long
def test_every_lane_trains_what_its_own_alignment_left(model_dir, trained):
    root, seen = trained
    active = np.array([read_json(result_path(root, Cell(model_dir, METHOD, "", seed)))["active_steps"]
                       for seed in SEEDS])
    assert (active.sum(axis=1) == 2).all() and len(np.unique(active, axis=0)) > 1, "or lanes would not differ"
    for text, expected in ((FROZEN, active == 0), (RAREST, np.arange(3) == active.argmin(axis=1)[:, None])):
        layers, moved = seen[text]
        np.testing.assert_array_equal(layers, expected)
        for of_leaf in moved:
            np.testing.assert_array_equal(of_leaf, expected)
        recorded = [read_json(result_path(root, Cell(model_dir, METHOD, text, seed)))["layers"] for seed in SEEDS]
        assert recorded == [np.flatnonzero(of).tolist() for of in expected]
    assert "layers" not in read_json(result_path(root, Cell(model_dir, METHOD, "", 0)))


@pytest.mark.long
def test_a_run_trains_what_its_alignment_left(model_dir, trained, tmp_path):
    root, _ = trained
    config = small_world.align_config(model_dir, tmp_path / "aligned", defense="t_vaccine", layers=1, sample_every=1,
                                      steps=2, seed=1)
    align(config)
    start = load_adapter(inputs.adapter_dir(tmp_path / "aligned"), stage.load_base(
        model_dir, "checkpoint", tmp_path / "aligned").model.clone(lora=config.adapter.lora()))
    attack(small_world.attack_config(tmp_path / "aligned", tmp_path / "r", only_layers=("frozen",), seed=1, steps=1,
                                     adapter="continue"))
    recorded = small_world.recorded(tmp_path / "r")
    as_lane = read_json(result_path(root, Cell(model_dir, METHOD, FROZEN, 1)))["layers"]
    assert recorded["data"]["layers"] == as_lane and recorded["flags"]["only_layers"] == ["frozen"]
    assert small_world.metrics(tmp_path / "aligned")[0]["active_layers"].count(True) == 1
    end = load_adapter(inputs.adapter_dir(tmp_path / "r"), stage.load_base(
        model_dir, "checkpoint", tmp_path / "r").model.clone(lora=config.adapter.lora()))
    for before, after in zip(*map(jax.tree.leaves, (start, end)), strict=True):
        assert [i for i in range(3) if (before[i] != after[i]).any()] == as_lane

    # One that recorded no active layers, or not all of its steps.
    path = tmp_path / "aligned" / "metrics.jsonl"
    lines = [{name: of for name, of in line.items() if name != "active_layers"}
             for line in small_world.metrics(tmp_path / "aligned")]
    for kept, message in ((lines, "expected numbers: only T-Vaccine's alignment"),
                          (lines[:1], "found 1 steps in .*expected the alignment's 2")):
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        with pytest.raises(FieldError, match=f"^only_layers: .*{message}"):
            attack(small_world.attack_config(tmp_path / "aligned", tmp_path / "s", only_layers=("frozen",)))
    assert not (tmp_path / "s").exists()
