"""Training of what is not held: which weights, that nothing else moves, and what EWC's penalty then is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine import attacks, defenses, optim, training
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

LAYERS = np.array([False, True, True, True])


@pytest.fixture(scope="module")
def fisher():
    adapter, frozen = toy.trees()
    return defenses.diagonal_fisher(toy.no_dropout, adapter, frozen, [toy.batch(i) for i in (7, 8)])


def train(defense, optimizer, steps=3):
    """(the trained state, metrics of every step)."""
    adapter, frozen = toy.trees()
    state, step = training.init_train_state(adapter, defense, optimizer), training.make_train_step(defense, optimizer)
    log = []
    for i in range(steps):
        state, metrics = step(state, frozen, {"user": toy.batch(i)}, jax.random.key(0))
        log.append(metrics)
    return state, log


def moved(state):
    return jax.tree.map(lambda x, y: np.asarray(x != y), state.adapter, toy.trees()[0])


def adamw(**given):
    return optim.layer_masked_adamw(optim.OptimizerConfig(learning_rate=0.05, weight_decay=0.5, **given), 3)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 10, width=32), min_size=6, max_size=6), st.floats(0.01, 1))
def test_which_are_held_least(values, share):
    """All of a tree's weights are compared with each other; those that are alike train alike."""
    values = np.array(values, np.float32) + 0.0
    tree = {"a": jnp.asarray(values[:4].reshape(2, 2)), "b": jnp.asarray(values[4:].reshape(2, 1))}
    found = attacks.least_held(tree, share)
    found = np.concatenate([np.ravel(found["a"]), np.ravel(found["b"])])
    assert found.sum() >= share * 6 - 1e-5
    assert not found.any() or not (~found).any() or values[found].max() < values[~found].min()
    assert (values[found] < values[found].max()).sum() < share * 6, "no more than are needed"


@pytest.mark.parametrize("name", ["adamw", "momentum", "whole matrices"])
def test_other_weights_do_not_move(fisher, name):
    """Whatever the optimizer does with zeros: decay, or mixing a matrix's elements."""
    def mix(updates, state, params=None):
        return jax.tree.map(lambda g: jnp.full_like(g, -0.1 * g.sum()), updates), state

    optimizer = {"adamw": adamw(), "momentum": optax.sgd(0.1, momentum=0.9),
                 "whole matrices": optax.GradientTransformation(lambda params: optax.EmptyState(), mix)}[name]
    state, log = train(attacks.unheld(defenses.sft(toy.no_dropout, "user"), 0.3, fisher), optimizer)
    trains = attacks.least_held(fisher, 0.3)
    jax.tree.map(np.testing.assert_array_equal, moved(state), trains)
    total = sum(leaf.size for leaf in jax.tree.leaves(fisher))
    share = sum(int(leaf.sum()) for leaf in jax.tree.leaves(trains)) / total
    np.testing.assert_allclose(log[0]["trained_share"], share, rtol=1e-5)
    np.testing.assert_allclose(share, 0.3, atol=1 / total)


def test_all_of_them_are_the_base(fisher):
    """Bit for bit, with all of them and with weights that are alike."""
    sft = defenses.sft(toy.no_dropout, "user")
    expected, _ = train(sft, adamw())
    for of in (attacks.unheld(sft, 1.0, fisher), attacks.unheld(sft, 0.1)):
        jax.tree.map(np.testing.assert_array_equal, train(of, adamw())[0].adapter, expected.adapter)


def test_clipping_sees_what_trains(fisher):
    defense = attacks.unheld(defenses.sft(toy.no_dropout, "user"), 0.3, fisher)
    adapter, frozen = toy.trees()
    grads = jax.grad(lambda w: toy.no_dropout(w, frozen, toy.batch(0))[0])(adapter)
    trains = attacks.least_held(fisher, 0.3)
    expected = np.sqrt(sum(np.sum((np.asarray(g) * t) ** 2) for g, t in zip(
        jax.tree.leaves(grads), jax.tree.leaves(trains), strict=True)))
    np.testing.assert_allclose(train(defense, adamw(), 1)[1][0]["gradient_norm"], expected, rtol=1e-5)


def test_what_ewc_still_holds(fisher):
    """What does not train adds exactly 0, whatever lam; the rest at most lam · quantile · ‖w − s‖²."""
    lam, (start, frozen) = 30.0, toy.trees()
    defense = attacks.unheld(defenses.ewc(toy.no_dropout, lam, fisher), 0.3, fisher)
    state, _ = train(defense, adamw())
    _, of_last, metrics = defense.gradient(state.adapter, frozen, state.defense, {"user": toy.batch()}, None)
    trains, apart = attacks.least_held(fisher, 0.3), jax.tree.map(jnp.subtract, state.adapter, start)
    held = jax.tree.map(lambda f, d, t: jnp.where(t, 0, f * d**2).sum(), fisher, apart, trains)
    assert all(leaf == 0 for leaf in jax.tree.leaves(held))
    quantile = max(float(jnp.where(t, f, 0).max()) for f, t in zip(
        jax.tree.leaves(fisher), jax.tree.leaves(trains), strict=True))
    squared = sum(float((d**2).sum()) for d in jax.tree.leaves(apart))
    assert 0 < metrics["penalty"] <= lam * quantile * squared * (1 + 1e-6)
    # Plain EWC with as strong a hold adds more.
    _, log = train(defenses.ewc(toy.no_dropout, lam, fisher), adamw())
    assert log[-1]["penalty"] > metrics["penalty"]
    assert isinstance(of_last, attacks.UnheldState) and isinstance(of_last.base, defenses.EwcState)


def test_with_only_some_layers(fisher):
    """From either side, and with a base that freezes by itself."""
    sft, trains = defenses.sft(toy.no_dropout, "user"), attacks.least_held(fisher, 0.3)
    expected = jax.tree.map(lambda t: np.asarray(t) & LAYERS.reshape(-1, *[1] * (t.ndim - 1)), trains)
    for of in (defenses.only_layers(attacks.unheld(sft, 0.3, fisher), LAYERS),
               attacks.unheld(defenses.only_layers(sft, LAYERS), 0.3, fisher)):
        jax.tree.map(np.testing.assert_array_equal, moved(train(of, adamw())[0]), expected)


def test_arguments_are_checked(fisher):
    sft = defenses.sft(toy.no_dropout, "user")
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"unheld: share: found {share}, expected more than 0 and at most 1"):
            attacks.unheld(sft, share)
    with pytest.raises(ValueError, match="unheld: fisher: found a tree of other shapes, expected one like the adapter"):
        attacks.unheld(sft, 0.5, fisher).init(toy.trees(layers=2)[0])


def test_masks_are_of_layers_or_of_weights():
    adapter, _ = toy.trees()
    masks = {"a": jnp.ones((toy.L, toy.D), bool), "b": jnp.ones(toy.L, bool)}
    defense = defenses.sft(toy.no_dropout, "user")._replace(trainable=lambda state, adapter: masks)
    with pytest.raises(ValueError, match=r"defense: trainable: found bool\[4, 5\], expected bool\[4\], one for each "
                                         r"layer, or bool\[4, 5, 5\], one for each weight"):
        training.init_train_state(adapter, defense, adamw())
