"""Model statistics at their smallest setting."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import common, lanes, model_statistics
from jaxvaccine import data, defenses
from jaxvaccine.losses import causal_lm_loss
from tests.experiments.test_lanes import world_model
from tests.experiments.test_sweep import ALIGN as SMALL
from tests.experiments.test_sweep import ATTACK, TESTS

pytestmark = pytest.mark.usefixtures("quick_compile")

# Fewer sites compile faster, and so do four harmful examples wherever some are measured.
ALIGN = dataclasses.replace(SMALL, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return world_model(tmp_path_factory.mktemp("world"))


def config_of(run_dir, model_dir, **changes):
    return model_statistics.StatisticsConfig(**{
        "run_dir": str(run_dir), "bases": (model_dir,), "methods": ("sft",), "attacks": ("poison_ratio=0.2",),
        "seeds": ("0", "5"), "score_steps": ("0",), "measure_every": 4, "harmful_probe": "world_harmful@harmful[0:4]",
        **TESTS, "sst2_test": "", "benign_test": "", **changes})


def test_a_run_and_its_continuation(model_dir, tmp_path):
    config = config_of(tmp_path / "s", model_dir)
    report = model_statistics.statistics(config, ALIGN, ATTACK)
    # Along the alignment, and four times along the attack.
    assert report.count("| sft |") == 5
    root = tmp_path / "s"
    assert (root / "statistics.png").stat().st_size > (root / "report.md").stat().st_size > 100
    cells = {path: path.read_text() for path in root.rglob("*.json") if path.parent != root}
    by_name = {path.name: json.loads(text) for path, text in cells.items()}
    assert by_name["aligned.json"]["steps"] == [0, 4, 6]
    scores = by_name["poison_ratio=0.2.json"]["scores"]
    assert scores.keys() == {"0", "2"}
    assert all(len(scores["2"][name]) == 2 for name in model_statistics.ATTACK)

    cell = next(path for path in cells if path.name == "poison_ratio=0.2.json")
    cell.unlink()
    assert model_statistics.statistics(config, ALIGN, ATTACK) == report
    assert {path: path.read_text() for path in cells} == cells


def test_what_is_measured(model_dir):
    """Against the loss of every lane by itself, and Booster's metrics."""
    base, tokenizer = common.load_base(model_dir, "checkpoint"), data.load_tokenizer(model_dir)
    config, seeds = config_of("r", model_dir), (0, 5)
    of = lanes.fresh(base, ALIGN, seeds)
    of = of._replace(adapters=jax.tree.map(lambda x: x + 0.05, of.adapters))
    attack = dataclasses.replace(ATTACK, poison_ratio=0.2)
    scorer = model_statistics.with_statistics(
        lambda of: ({"harmful_score": [1.0, 2.0]}, "answers"), config, attack, 0.1, tokenizer)
    scores, answers = scorer(of)
    assert (scores["harmful_score"], answers) == ([1.0, 2.0], "answers")
    aligning = model_statistics.measure_alignment(config, ALIGN, tokenizer)(0, of)
    booster = defenses.booster(causal_lm_loss(of.model), alpha=ALIGN.alpha)
    gradient = jax.jit(lambda adapter, batch: booster.gradient(
        adapter, base.frozen, (), {"alignment": batch, "harmful": batch}, None)[2])

    def metrics(examples):
        tokenized = data.tokenize_examples(tokenizer, examples, 16)
        return gradient(of.lane(i)[0], data.collate(tokenized, range(len(tokenized.input_ids)), 16))

    user, harmful = (data.load_examples(source) for source in (attack.user_data, attack.harmful_data))
    for i, seed in enumerate(seeds):
        poisoned = data.poison(user, harmful, attack.n, 0.2, seed)
        found = metrics([example for example in poisoned if example in harmful])
        assert scores["harmful_training_loss"][i] == pytest.approx(float(found["harmful_loss"]), rel=1e-4)
        assert scores["harmful_gradient_norm"][i] == pytest.approx(float(found["harmful_gradient_norm"]), rel=1e-4)
        found = metrics(data.load_examples(TESTS["harmful_test"]))
        assert scores["harmful_test_loss"][i] == pytest.approx(float(found["harmful_loss"]), rel=1e-4)
        found = metrics(data.load_examples("world_harmful@harmful[0:4]"))
        reduction = float(found["harmful_loss"] - found["perturbed_harmful_loss"])
        assert aligning["reduction"][i] == pytest.approx(reduction, rel=1e-3)
    assert not np.allclose(*scores["harmful_training_loss"], rtol=1e-3)


def test_flags_are_checked(model_dir, tmp_path):
    with pytest.raises(ValueError, match="--measure_every: found 0"):
        config_of("r", model_dir, measure_every=0)
    with pytest.raises(ValueError, match="--harmful_probe: found ''"):
        config_of("r", model_dir, harmful_probe="")
    with pytest.raises(ValueError, match="--attacks: found 'poison_ratio=0', an attack without harmful examples"):
        model_statistics.statistics(config_of(tmp_path / "r", model_dir, attacks=("poison_ratio=0",)), ALIGN, ATTACK)
    assert not (tmp_path / "r").exists()


def test_spread():
    assert model_statistics.spread(np.array([0.5, 1.5])) == "1 ± 0.71"
    assert model_statistics.spread(np.array([12.345])) == "12.3"
