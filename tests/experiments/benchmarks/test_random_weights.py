"""The weights that both sides make: equal to the last bit, and random enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import random_weights
from jaxvaccine import llama
from jaxvaccine.checkpoints.tensor_names import tensor_sites
from tests import tiny


@pytest.mark.parametrize("family, dtype", [
    ("llama", "float32"), ("llama", "bfloat16"), ("gemma2", "float32"), ("qwen2", "float32")])
def test_both_sides_have_the_same(family, dtype, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from experiments.benchmarks.pytorch_step import make_base

    monkeypatch.setattr(random_weights, "CHUNK", 200)  # several for each tensor
    config = tiny.FAMILIES.get(family, tiny.CONFIG)
    ours = random_weights.frozen(llama.Llama(config, None, jnp.dtype(dtype).type))
    theirs = dict(make_base(config, dtype, "cpu", "eager").named_parameters())
    sites = tensor_sites(config)
    assert set(theirs) == set(sites)
    for name, parameter in theirs.items():
        site, leaf = sites[name], ours
        for key in site.path:
            leaf = leaf[key]
        assert leaf.dtype == jnp.dtype(dtype)
        expected = leaf if site.layer is None else leaf[site.layer]
        found = parameter.detach().to(torch.float32).numpy()
        np.testing.assert_array_equal(found.T if site.transposed else found, np.asarray(expected, np.float32), name)


def test_they_are_random():
    """Each leaf uniform with the deviation, no two of them alike."""
    frozen = random_weights.frozen(llama.Llama(tiny.CONFIG))
    matrices = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(frozen) if leaf.ndim in (2, 3)
                and np.ptp(leaf) > 0]
    assert len(matrices) == 9
    for leaf in matrices:
        assert abs(leaf.mean()) < 5 * random_weights.DEVIATION / leaf.size**0.5
        assert leaf.std() == pytest.approx(random_weights.DEVIATION, rel=0.05)
        # Neighbours, in a row and a column apart.
        for apart in (1, tiny.CONFIG.hidden_size):
            assert abs(np.corrcoef(leaf[:-apart], leaf[apart:])[0, 1]) < 5 / leaf.size**0.5
    shortest = min(map(len, matrices))
    correlations = np.corrcoef([leaf[:shortest] for leaf in matrices]) - np.eye(len(matrices))
    assert np.abs(correlations).max() < 5 / shortest**0.5


def test_an_adapter_of_which_all_is_at_work():
    adapter = random_weights.adapter(tiny.model())
    assert all(np.abs(leaf).max() > 0 and leaf.dtype == np.float32 for leaf in jax.tree.leaves(adapter))
    shapes = llama.tree_shapes(tiny.model())["lora"]
    assert jax.tree.map(np.shape, adapter) == jax.tree.map(lambda x: x.shape, shapes)
