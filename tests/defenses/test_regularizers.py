"""EWC's and KL's arguments and states; their gradients are checked in parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import defenses, optim, training
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCHES = {"user": toy.batch()}


def loss_and_kl(adapter, frozen, batch, reference, key=None):
    loss, _ = toy.no_dropout(adapter, frozen, batch)
    return loss, sum(((adapter[name] - reference[name]) ** 2).sum() for name in adapter)


def test_fisher_weights_are_summed_squares():
    adapter, frozen = toy.trees()
    several = [toy.batch(i) for i in range(3)]
    found = defenses.diagonal_fisher(toy.no_dropout, adapter, frozen, several)
    grads = [jax.grad(lambda w, batch=batch: toy.no_dropout(w, frozen, batch)[0])(adapter) for batch in several]
    for name in found:
        np.testing.assert_allclose(found[name], sum(g[name] ** 2 for g in grads), rtol=1e-5)
    with pytest.raises(ValueError, match="diagonal_fisher: batches: found none, expected at least one"):
        defenses.diagonal_fisher(toy.no_dropout, adapter, frozen, [])


@pytest.mark.parametrize("fisher", [None, 3.0])
def test_the_penalty_is_of_the_distance_from_the_start(fisher):
    adapter, frozen = toy.trees()
    weights = None if fisher is None else jax.tree.map(lambda x: jnp.full(x.shape, fisher), adapter)
    defense = defenses.ewc(toy.no_dropout, 0.5, weights)
    state, moved = defense.init(adapter), jax.tree.map(lambda x: x + 1, adapter)
    grads, state, metrics = jax.jit(defense.gradient)(moved, frozen, state, BATCHES, None)
    expected = jax.grad(lambda w: toy.no_dropout(w, frozen, BATCHES["user"])[0])(moved)
    weight = 1.0 if fisher is None else fisher
    for name in grads:  # d/dw of lam · F · (w − s)² at w − s = 1
        np.testing.assert_allclose(grads[name] - expected[name], np.full(grads[name].shape, weight), rtol=1e-4)
    size = sum(x.size for x in adapter.values())
    np.testing.assert_allclose(metrics["penalty"], 0.5 * weight * size, rtol=1e-5)


@pytest.mark.parametrize("defense", [
    defenses.ewc(toy.no_dropout, 1.0), defenses.kl(loss_and_kl, 1.0),
    defenses.only_layers(defenses.ewc(toy.no_dropout, 1.0), jnp.array([True, False, True, True]))])
def test_what_it_is_held_to_stays_while_it_trains(defense):
    """The training step donates its state."""
    adapter, frozen = toy.trees()
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(0.05), 3)
    step, state = training.make_train_step(defense, optimizer), training.init_train_state(adapter, defense, optimizer)
    for _ in range(3):
        state, metrics = step(state, frozen, BATCHES, jax.random.key(0))
    for name in adapter:
        np.testing.assert_array_equal(state.defense.start[name], adapter[name])
        assert (state.adapter[name] != adapter[name]).any()
    assert metrics.get("penalty", metrics.get("kl")) > 0


@pytest.mark.parametrize("make, name", [(defenses.ewc, "ewc"), (defenses.kl, "kl")])
def test_arguments_are_checked(make, name):
    with pytest.raises(ValueError, match=f"{name}: lam: found -1.0, expected a finite number >= 0"):
        make(toy.loss_fn, -1.0)
    adapter, frozen = toy.trees()
    defense = make(toy.loss_fn)
    with pytest.raises(KeyError, match=rf"{name}: batches: found \['alignment'\], expected also 'user'"):
        defense.gradient(adapter, frozen, defense.init(adapter), {"alignment": toy.batch()}, None)


def test_fisher_weights_of_another_adapter():
    adapter, _ = toy.trees()
    other, _ = toy.trees(layers=2)
    with pytest.raises(ValueError, match="ewc: fisher: found a tree of other shapes, expected one like the adapter"):
        defenses.ewc(toy.loss_fn, fisher=other).init(adapter)
