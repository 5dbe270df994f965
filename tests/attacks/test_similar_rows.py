"""Gradient matching against a plain double loop, in PyTorch and over a LLaMA's rows."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.attacks.similar_rows import cosines, mean_gradient, most_similar
from jaxvaccine.losses import causal_lm_loss
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")


def toy_rows(rng, count):
    """Rows of different lengths: features [1, T, 5] and a class a position [1, T]."""
    return [{"x": rng.normal(size=(1, t, 5)).astype(np.float32), "y": rng.integers(0, 4, (1, t))}
            for t in rng.integers(1, 5, count)]


def toy_loss(adapter, frozen, batch):
    logits = batch["x"] @ (frozen + adapter["a"] @ adapter["b"])
    picked = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), batch["y"][..., None], -1)
    return -picked.mean(), {}


def test_equals_a_double_loop_in_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    adapter = {"a": rng.normal(size=(5, 2)).astype(np.float32), "b": rng.normal(size=(2, 4)).astype(np.float32)}
    frozen = rng.normal(size=(5, 4)).astype(np.float32)
    harmful, candidates = toy_rows(rng, 4), toy_rows(rng, 7)

    def gradient(row):
        a, b = (torch.tensor(adapter[name], dtype=torch.float64, requires_grad=True) for name in "ab")
        logits = torch.tensor(row["x"][0], dtype=torch.float64) @ (torch.tensor(frozen, dtype=torch.float64) + a @ b)
        torch.nn.functional.cross_entropy(logits, torch.tensor(row["y"][0])).backward()
        return torch.cat([a.grad.flatten(), b.grad.flatten()])

    mean = torch.stack([gradient(row) for row in harmful]).mean(0)
    expected = [float(torch.nn.functional.cosine_similarity(gradient(row), mean, dim=0)) for row in candidates]
    direction = mean_gradient(toy_loss, adapter, frozen, iter(harmful))
    found = np.concatenate([np.ravel(direction[name]) for name in "ab"])
    np.testing.assert_allclose(found, mean.numpy(), rtol=1e-5, atol=1e-6)
    scores = cosines(toy_loss, adapter, frozen, iter(candidates), direction)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0.3, "scores that are alike would show nothing"
    assert most_similar(scores, 3).tolist() == sorted(np.argsort(expected)[-3:])


def test_rows_of_a_llama():
    """A row counts by its own mean over its answer, whatever it is padded to; a fresh adapter's B has all of it."""
    model = tiny.model(rank=2, remat="none")
    adapter, frozen = tiny.trees(model)
    adapter = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if path[-1].key == "b" else leaf, adapter)
    loss_fn = causal_lm_loss(model)
    rows = [{name: of[None, i] for name, of in tiny.batch(seed=4, rows=6).items()} for i in range(6)]
    gradient = jax.jit(jax.grad(lambda a, row: loss_fn(a, frozen, row)[0]))
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient(adapter, row))]) for row in rows]
    mean = np.mean(flat[:2], axis=0)
    # One of the harmful rows is a candidate too, and the most similar.
    expected = [of @ mean / np.linalg.norm(of) / np.linalg.norm(mean) for of in flat[1:]]
    padded = [{name: np.pad(of, ((0, 0), (0, 8)), constant_values=-100 if name == "labels" else 0)
               for name, of in row.items()} for row in rows]
    direction = mean_gradient(loss_fn, adapter, frozen, padded[:2])
    np.testing.assert_allclose(cosines(loss_fn, adapter, frozen, padded[1:], direction), expected, atol=1e-4)
    assert most_similar(np.array(expected), 1).tolist() == [0] and np.ptp(expected) > 0.3
    leaves = {path[-1].key: bool(np.abs(leaf).max() > 0)
              for path, leaf in jax.tree_util.tree_leaves_with_path(direction)}
    assert leaves == {"a": False, "b": True}


def test_of_nothing():
    adapter, frozen = {"a": np.zeros((5, 2)), "b": np.zeros((2, 4))}, np.zeros((5, 4))
    row = {"x": np.ones((1, 1, 5)), "y": np.zeros((1, 1), int)}
    direction = mean_gradient(toy_loss, adapter, frozen, [row])
    assert cosines(toy_loss, adapter, frozen, [row], direction).tolist() == [0], "no gradient is like no other"
    with pytest.raises(ValueError, match="mean_gradient: rows: found none"):
        mean_gradient(toy_loss, adapter, frozen, [])
    with pytest.raises(ValueError, match=r"most_similar: count: found 3, expected 0 to 2"):
        most_similar(np.zeros(2), 3)


@settings(max_examples=50)
@given(st.lists(st.integers(-3, 3), max_size=12), st.data())
def test_the_largest_are_chosen(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    chosen = most_similar(np.array(scores, np.float32), count).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == count
    expected = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]  # sorted is stable: of equal ones the first
    assert chosen == sorted(expected)
