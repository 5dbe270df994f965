"""The README's Python runs as it stands, in as many lines as it says; the example of a new defense computes what it
says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine.checkpoints.peft import load_adapter
from tests import markdown
from tests.markdown import ROOT

README = ROOT / "README.md"
METHODS = ROOT / "docs" / "methods.md"


def run(block, page, names):
    exec(compile(block, str(page), "exec"), names)
    return names


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What README's Python defines."""
    (block,) = markdown.python_blocks(README)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        names = run(block, README, {})
        names["saved"] = load_adapter("adapter", names["model"])
    return names


def test_lengths():
    """A short page: so many lines in all, of shell and of Python."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    (block,) = markdown.python_blocks(README)
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    shell = next(b.text for b in markdown.blocks(README) if b.code and "jaxvaccine align" in b.text)
    assert len(shell.splitlines()) <= 10


@pytest.mark.long
def test_training(names):
    """It learns to refuse, and the adapter on disk is the trained one."""
    loss = jax.jit(lambda adapter: names["loss_fn"](adapter, names["frozen"], names["batches"](0)["alignment"])[0])
    assert loss(names["trained"].adapter) < 0.5 * loss(names["adapter"])
    jax.tree.map(np.testing.assert_array_equal, names["saved"], names["trained"].adapter)


def test_the_new_defense():
    """On h(w) = w'Aw / 2, whose gradients are known: f + lam · A (alpha u), u of length 1, drawn with the key."""
    a = jnp.diag(jnp.arange(1.0, 5.0))

    def loss_fn(w, frozen, batch, perturbations=None, key=None):
        return (w["x"].sum() if batch == "f" else w["x"] @ a @ w["x"] / 2), {}

    (block,) = markdown.python_blocks(METHODS)
    assert len(block.splitlines()) <= 60, "a new defense in at most 60 lines"
    defense = run(block, METHODS, {})["random_booster"](loss_fn, lam=2.0, alpha=0.3)
    w, steps = {"x": jnp.array([1.0, -2.0, 0.5, 3.0])}, []
    for seed in (0, 1):
        grads, state, metrics = defense.gradient(
            w, None, defense.init(w), {"alignment": "f", "harmful": "h"}, jax.random.key(seed))
        assert state == () and metrics["loss"] == w["x"].sum()
        steps.append(jnp.linalg.solve(a, (grads["x"] - 1) / 2.0))
        assert jnp.linalg.norm(steps[-1]) == pytest.approx(0.3, rel=1e-4)
    assert not np.allclose(*steps)
