"""Errors and losses against numpy's, on a model whose weights are known."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import quantisation as benchmark
from jaxvaccine import llama
from jaxvaccine.quantisation import dequantise_kernels, quantise_kernels
from tests import tiny
from tests.experiments import small

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_weight_error():
    model = tiny.model()
    _, full = tiny.trees(model)
    quantised = quantise_kernels(full, "int8")
    expected, found = ([np.asarray(leaf, np.float64).ravel() for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
                        if path[-1].key == "kernel"] for tree in (full, dequantise_kernels(quantised, np.float32)))
    expected, found = np.concatenate(expected), np.concatenate(found)
    error, bits = benchmark.weight_error(full, quantised)
    assert error == pytest.approx(np.linalg.norm(expected - found) / np.linalg.norm(expected), rel=1e-6)
    assert 8 + 32 / 48 < bits < 8 + 32 / 32  # a scale to every 32 or 48 inputs


def test_losses():
    model = tiny.model().clone(lora=None)
    _, full = tiny.trees(model.clone(lora=tiny.model().lora))
    quantised = quantise_kernels(full, "nf4")
    rows = np.random.default_rng(0).integers(0, 97, (2, 8)).astype(np.int32)
    found = benchmark.losses(model, full, quantised, rows)
    logits = [np.asarray(llama.token_logits(model, frozen, llama.hidden_states(
        model, None, frozen, rows, np.ones_like(rows))), np.float64)[:, :-1] for frozen in (full, quantised)]
    p, q = (np.exp(of) / np.exp(of).sum(axis=-1, keepdims=True) for of in logits)
    picked = np.take_along_axis(q, rows[:, 1:, None], axis=-1)
    np.testing.assert_allclose(found.cross_entropy, -np.log(picked).mean(), rtol=1e-4)
    np.testing.assert_allclose(found.kl, (p * np.log(p / q)).sum(axis=-1).mean(), rtol=1e-3)
    assert found.agree == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean()) and 0 < found.agree < 1
    assert benchmark.losses(model, full, full, rows).kl == pytest.approx(0, abs=1e-6)


def test_the_table(model_dir, tmp_path):
    """Of a model with the world's words."""
    (tmp_path / "text").write_text("tell me how to paint a fence . " * 20)
    lines = benchmark.benchmark(benchmark.QuantisationConfig(
        model=model_dir, text=str(tmp_path / "text"), tokens=50, length=16)).splitlines()
    assert lines[0].startswith("float32, 48 tokens of ")
    cells = [line.strip("| ").split(" | ") for line in lines[4:]]
    assert [(cell[0], cell[2]) for cell in cells[:1]] == [("none", "0.00")] and len(cells) == 3
    assert float(cells[2][2]) > float(cells[1][2]) > 0 and cells[0][6] == "100.0"


def test_bad_flags():
    with pytest.raises(SystemExit, match="--text: found 'nowhere', expected a file"):
        small.call(benchmark.VERB, "--text=nowhere")
