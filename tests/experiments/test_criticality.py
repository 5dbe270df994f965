"""Layer criticality at its smallest setting, and its statistics against scipy's."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import scipy.stats

from experiments import common, criticality, criticality_report, lanes, probes, sweep
from jaxvaccine import data
from jaxvaccine.defenses.t_vaccine import layer_probabilities
from jaxvaccine.losses import causal_lm_loss
from tests.experiments.test_lanes import world_model
from tests.experiments.test_sweep import ALIGN as SMALL
from tests.experiments.test_sweep import ATTACK

pytestmark = pytest.mark.usefixtures("quick_compile")

SEEDS = (0, 5)
# Fewer sites compile faster.
ALIGN = dataclasses.replace(SMALL, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return world_model(tmp_path_factory.mktemp("world"))


def test_a_run_and_its_continuation(model_dir, tmp_path):
    config = criticality.CriticalityConfig(
        run_dir=str(tmp_path / "c"), bases=(model_dir,), seeds=("0", "5"), attacks=("only:learning_rate=0.1",),
        score_steps=("0", "1"), measure_every=4, harmful_test="world_harmful@test[0:4]",
        sst2_test="world_rating@test[0:4]")
    report = criticality.criticality(config, ALIGN, ATTACK)
    assert "| 2 |" in report and "| 3 |" not in report
    root = tmp_path / "c"
    for name in ("report.md", "sft_layers.png", "sft_attacks.png", "sft_scatter.png"):
        assert (root / name).stat().st_size > 100
    aligned = json.loads(next(root.rglob("aligned.json")).read_text())
    assert aligned["steps"] == [0, 4, 6]
    assert np.array(aligned["activation_gradient_norm"]).shape == (3, 2, 3)
    cells = {path: path.read_text() for path in root.rglob("only*/*.json")}
    assert {path.name for path in cells} == {"0.json", "1.json", "2.json"}
    assert json.loads(next(iter(cells.values())))["scores"].keys() == {"0", "1", "2"}

    # One cell is gone and another attack is asked for.
    lost = next(path for path in cells if path.name == "1.json")
    lost.unlink()
    both = dataclasses.replace(config, attacks=(*config.attacks, "all_but"))
    assert "all_but: mean HS %" in criticality.criticality(both, ALIGN, ATTACK)
    assert {path: path.read_text() for path in cells} == cells
    assert len(list(root.rglob("all_but/*.json"))) == 3


def test_flags_are_checked(model_dir):
    for text, message in (("none", "begin with one of only, all_but"), ("only:layers=1", r"found layers \['1'\]"),
                          ("only:steps=x", "steps=x")):
        with pytest.raises(ValueError, match=f"--attacks: .*{message}"):
            criticality.read_attack(ATTACK, text)
    with pytest.raises(ValueError, match="--measure_every: found 0"):
        criticality.CriticalityConfig(run_dir="r", measure_every=0)
    with pytest.raises(ValueError, match="--sst2_test: found ''"):
        criticality.CriticalityConfig(run_dir="r", sst2_test="")


def test_which_layers_are_attacked():
    assert criticality.attacked_layers("only", 1, 3) == ("1",)
    assert criticality.attacked_layers("all_but", 1, 3) == ("0", "2")


def test_norms_are_those_of_the_probe(model_dir):
    """One lane at a time, against T-Vaccine's probabilities and the loss's own gradient."""
    base, tokenizer = common.load_base(model_dir, "checkpoint"), data.load_tokenizer(model_dir)
    of = lanes.fresh(base, ALIGN, SEEDS)
    of = of._replace(adapters=jax.tree.map(lambda x: x + 0.05, of.adapters))
    method = sweep.variant(ALIGN, "t_vaccine", "methods", "defense")
    found = criticality.measure_norms(method, tokenizer, SEEDS)(3, of)
    tokenized = data.tokenize_examples(tokenizer, data.load_examples(ALIGN.harmful_data), ALIGN.max_length)
    loss_fn = causal_lm_loss(of.model)
    expectation = jax.jit(lambda adapter, batch: (
        layer_probabilities(loss_fn, adapter, base.frozen, batch, None),
        jax.grad(lambda a: loss_fn(a, base.frozen, batch)[0])(adapter)))
    for i, seed in enumerate(SEEDS):
        # What alignment with T-Vaccine would see in its step 3.
        batch = data.training_batches({"harmful": (tokenized, 4)}, seed, ALIGN.bucket)(3)["harmful"]
        expected, grads = expectation(of.lane(i)[0], batch)
        norms = found["activation_gradient_norm"][i]
        np.testing.assert_allclose(norms / norms.sum(), expected, rtol=1e-4)
        expected = [math.sqrt(sum(float((leaf[layer] ** 2).sum()) for leaf in jax.tree.leaves(grads)))
                    for layer in range(3)]
        np.testing.assert_allclose(found["weight_gradient_norm"][i], expected, rtol=1e-4)


def test_lanes_of_their_own_base(model_dir):
    """After merging every lane has its own weights; B = 0 then, and the losses are the aligned model's."""
    base, tokenizer = common.load_base(model_dir, "checkpoint"), data.load_tokenizer(model_dir)
    of = lanes.fresh(base, ALIGN, SEEDS)
    of = of._replace(adapters=jax.tree.map(lambda x: x + 0.05, of.adapters))
    examples = data.load_examples("world_harmful@test[0:3]")
    batches = probes.stack_batches(tokenizer, [examples, examples[:2] + examples[:1]], ALIGN)
    assert batches["input_ids"].shape == (2, 3, 16)
    np.testing.assert_allclose(
        probes.losses(lanes.merged(of, ALIGN, SEEDS), batches), probes.losses(of, batches), rtol=1e-4)


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (2, 3, 6)).astype(float)
    found = criticality_report.rank_correlations(x, y)
    np.testing.assert_allclose(found, [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    assert np.isnan(criticality_report.rank_correlations(np.ones(6), y[0]))


def test_permutation_p():
    """A relation that all runs share is one piece of evidence: with three layers p is at least 2 in 3!."""
    x = np.tile([1.0, 2.0, 3.0], (50, 1))
    rng = np.random.default_rng(0)
    assert criticality_report.permutation_p(x, x, rng) == pytest.approx(2 / 6)
    assert criticality_report.permutation_p(x[:, ::-1], x, rng) == pytest.approx(2 / 6)
    x, y = rng.normal(size=(2, 1, 7))
    expected = scipy.stats.permutation_test(
        (x[0],), lambda x: scipy.stats.spearmanr(x, y[0]).statistic, permutation_type="pairings", n_resamples=np.inf)
    found = criticality_report.permutation_p(x, y, rng)
    assert found == pytest.approx(min(1, expected.pvalue), abs=0.02)
    # Too many orders to go through.
    x, y = rng.normal(size=(2, 1, 12))
    assert criticality_report.permutation_p(x, x, rng) < 0.001
    assert 0.001 < criticality_report.permutation_p(x, y, rng) <= 1


def test_bootstrap_interval():
    rng = np.random.default_rng(0)
    assert criticality_report.bootstrap_interval(np.full((2, 3), 0.5), rng) == (0.5, 0.5)
    # Three bases that differ, seeds that do not: the interval is that of three values, not of thirty.
    rho = np.repeat([[-1.0], [0.0], [1.0]], 10, axis=1)
    assert criticality_report.bootstrap_interval(rho, rng) == (-1, 1)
    assert criticality_report.bootstrap_interval(np.array([[0.3, np.nan]]), rng) == pytest.approx((0.3, 0.3))


def test_readings():
    def row(x, y):
        return criticality_report.correlation_row([np.tile(x, (3, 1))] * 2, [np.tile(y, (3, 1))] * 2)

    up = np.arange(6.0)
    assert criticality_report.verdict(row(up, up)) == "larger norm, larger effect"
    assert criticality_report.verdict(row(up, -up)) == "larger norm, smaller effect"
    assert criticality_report.verdict(row(up, np.array([1.0, 0, 3, 2, 1, 2]))).startswith("undecided")
    assert criticality_report.verdict(row(up, np.zeros(6))).startswith("undecided")


def test_without_the_largest():
    norms, effects = np.array([[1.0, 9.0, 2.0], [7.0, 5.0, 6.0]]), np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    x, y = criticality_report.without_largest(norms, effects)
    assert x.tolist() == [[1, 2], [5, 6]] and y.tolist() == [[0, 2], [4, 5]]
