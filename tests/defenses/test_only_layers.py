"""Training of some layers alone."""

import jax
import numpy as np
import pytest

from jaxvaccine import defenses, optim, training
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

LAYERS = np.array([False, True, False, True])


def train(defense, adapter):
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=0.01), 3)
    state, step = training.init_train_state(adapter, defense, optimizer), training.make_train_step(defense, optimizer)
    for i in range(3):
        state, metrics = step(state, toy.trees()[1], toy.batches(i), jax.random.key(0))
    return state.adapter, metrics


def test_it_is_the_training_of_a_model_with_only_these_adapters():
    """Against an adapter that has no other layers: theirs are part of the base there."""
    adapter, _ = toy.trees()

    def loss_of_two(two, frozen, batch, perturbations=None, key=None):
        whole = jax.tree.map(lambda x, y: x.at[np.flatnonzero(LAYERS)].set(y), adapter, two)
        return toy.no_dropout(whole, frozen, batch, perturbations)

    expected, expected_metrics = train(defenses.sft(loss_of_two), jax.tree.map(lambda x: x[LAYERS], adapter))
    found, metrics = train(defenses.only_layers(defenses.sft(toy.no_dropout), LAYERS), adapter)
    for name in found:
        np.testing.assert_allclose(found[name][LAYERS], expected[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found[name][~LAYERS], adapter[name][~LAYERS])
    # Clipping sees the norm of what trains.
    np.testing.assert_allclose(metrics["gradient_norm"], expected_metrics["gradient_norm"], rtol=1e-5)


def test_what_the_defense_freezes_stays_frozen():
    defense = defenses.t_vaccine(toy.no_dropout, 1.0, layers=2, sample_every=1, probe_every=4)
    both = defenses.only_layers(defense, LAYERS)
    for (_, _, alone), (grads, state, metrics) in zip(toy.run(defense, 6), toy.run(both, 6), strict=True):
        np.testing.assert_array_equal(metrics["active_layers"], alone["active_layers"])
        expected = LAYERS & np.asarray(metrics["active_layers"])
        np.testing.assert_array_equal(both.trainable(state, grads), expected)
        for leaf in grads.values():
            np.testing.assert_array_equal(np.asarray(leaf).reshape(4, -1).any(axis=1), expected)
    released = defenses.t_vaccine(toy.blocks_no_dropout, layers=2, freeze="released", in_mlp=toy.in_mlp)
    adapter = toy.in_blocks(toy.trees()[0])
    masks = defenses.only_layers(released, LAYERS).trainable(released.init(adapter), adapter)
    assert all((mask == LAYERS).all() for mask in jax.tree.leaves(masks))


def test_layers_are_checked():
    sft = defenses.sft(toy.no_dropout)
    for layers, found in (([1, 3], r"int32 \[2\]"), ([[True]], r"bool \[1, 1\]")):
        with pytest.raises(ValueError, match=rf"only_layers: layers: found {found}, expected bool \[L\]"):
            defenses.only_layers(sft, layers)
    with pytest.raises(ValueError, match="found 3, expected one for each of the 4 layers"):
        defenses.only_layers(sft, LAYERS[:3]).init(toy.trees()[0])
