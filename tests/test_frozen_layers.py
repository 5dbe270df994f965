"""The training step and what a defense does not train: whatever the optimizer, the wrapper, or the state is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvaccine import defenses, optim, training
from jaxvaccine.defenses import Defense
from jaxvaccine.experiment.lanes import lane_axes
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
LAYERS = np.array([False, True, False, True])
T_VACCINE = defenses.t_vaccine(toy.loss_fn, layers=2, sample_every=1)
RELEASED = defenses.t_vaccine(toy.blocks_loss, layers=1, sample_every=1, freeze="released", in_mlp=toy.in_mlp)
ADAMW = optim.layer_masked_adamw(optim.OptimizerConfig(0.05), 5)
OPTIMIZERS = {
    "adamw": optax.adamw(0.05, weight_decay=0.5), "momentum": optax.sgd(0.1, momentum=0.9), "lion": optax.lion(0.01),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.5), optax.sgd(0.1)),
    "layer_masked_adamw": ADAMW}


def steps(defense, optimizer, adapter, count=5):
    """[(adapter before, adapter after, state)] of every step."""
    step, state, out = training.make_train_step(defense, optimizer), training.init_train_state(
        adapter, defense, optimizer), []
    for i in range(count):
        before = jax.tree.map(np.array, state.adapter)
        state, _ = step(state, toy.trees()[1], toy.batches(i), KEY)
        out.append((before, *jax.tree.map(np.array, (state.adapter, state))))
    return out


def same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda f, e: np.testing.assert_array_equal(
        np.asarray(f).reshape(-1).view(np.uint8), np.asarray(e).reshape(-1).view(np.uint8)), found, expected)


@pytest.mark.parametrize(("name", "optimizer"), [
    *(("t_vaccine", optimizer) for optimizer in OPTIMIZERS),
    *((name, "adamw") for name in ("released", "only_layers", "booster"))])
def test_nothing_frozen_moves(name, optimizer):
    blocks = toy.in_blocks if name == "released" else lambda adapter: adapter
    defense = {"t_vaccine": T_VACCINE, "released": RELEASED, "booster": defenses.booster(toy.loss_fn, base=T_VACCINE),
               "only_layers": defenses.only_layers(defenses.sft(toy.loss_fn), LAYERS)}[name]
    for before, after, state in steps(defense, OPTIMIZERS[optimizer], blocks(toy.trees()[0])):
        masks = jax.tree.leaves(jax.tree.broadcast(defense.trainable(state.defense, after), after))
        for mask, old, new in zip(masks, jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            same_bits(new[~mask], old[~mask])
            assert (old[mask] != new[mask]).reshape(mask.sum(), -1).any(axis=1).all()


@pytest.mark.parametrize("defense", [T_VACCINE, defenses.only_layers(defenses.sft(toy.loss_fn), LAYERS)])
def test_the_published_optimizer_computes_what_it_computed(defense):
    """It masks by itself: that the step does too changes no bit."""
    @jax.jit
    def unmasked(state, batches):
        grads, of_defense, _ = defense.gradient(
            state.adapter, toy.trees()[1], state.defense, batches, training.step_key(KEY, state.step))
        updates, of_optimizer = ADAMW.update(
            grads, state.optimizer, state.adapter, trainable=defense.trainable(of_defense, state.adapter))
        return training.TrainState(
            state.step + 1, optax.apply_updates(state.adapter, updates), of_optimizer, of_defense)

    expected = training.init_train_state(toy.trees()[0], defense, ADAMW)
    for i, (_, _, state) in enumerate(steps(defense, ADAMW, toy.trees()[0])):
        expected = unmasked(expected, toy.batches(i))
        same_bits(state, jax.tree.map(np.array, expected))


def test_without_a_mask_the_step_has_no_equation_more():
    defense, optimizer = defenses.sft(toy.no_dropout), optax.adamw(0.1)
    state = training.init_train_state(toy.trees()[0], defense, optimizer)

    def plain(state, frozen, batches, key):
        grads, _, _ = defense.gradient(
            state.adapter, frozen, state.defense, batches, training.step_key(key, state.step))
        updates, of_optimizer = optimizer.update(grads, state.optimizer, state.adapter)
        return state.step + 1, optax.apply_updates(state.adapter, updates), of_optimizer, optax.tree.norm(grads)

    arguments = state, toy.trees()[1], toy.batches(), KEY
    step = jax.make_jaxpr(training.make_train_step(defense, optimizer))(*arguments).eqns[0].params["jaxpr"]
    assert len(step.jaxpr.eqns) == len(jax.make_jaxpr(plain)(*arguments).jaxpr.eqns)


def test_gradients_of_frozen_layers_are_nothing_to_the_optimizer():
    """A wrapper that adds to all gradients neither moves what is frozen nor takes a share of the clipped norm."""
    def gradient(adapter, frozen, state, batches, key):
        grads, state, metrics = T_VACCINE.gradient(adapter, frozen, state, batches, key)
        masks = T_VACCINE.trainable(state, adapter)
        return defenses.base.select_layers(masks, grads, jax.tree.map(lambda w: 100 + w, adapter)), state, metrics

    for found, expected in zip(*(steps(d, ADAMW, toy.trees()[0]) for d in (
            T_VACCINE._replace(gradient=gradient), T_VACCINE)), strict=True):
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found[2], expected[2])


# Wrappers


class Wrapped(NamedTuple):
    calls: jax.Array
    inner: NamedTuple


WRAPS = {
    "as it is": lambda state: state, "a field": lambda state: Wrapped(jnp.zeros(()), state),
    "a pair": lambda state: (state, jnp.zeros(())), "a dict": lambda state: {"base": [state]},
    "by its name alone": lambda state: {"active_layers": state.active_layers}}


@pytest.mark.parametrize("how", WRAPS)
def test_a_wrapper_that_forgets_what_trains(how):
    forgetful = Defense(lambda adapter: WRAPS[how](T_VACCINE.init(adapter)), T_VACCINE.gradient)
    with pytest.raises(ValueError, match=r"found active_layers in its state and no trainable"):
        training.init_train_state(toy.trees()[0], forgetful, ADAMW)


def test_a_wrapper_that_passes_it_on():
    def gradient(adapter, frozen, state, batches, key):
        grads, inner, metrics = T_VACCINE.gradient(adapter, frozen, state.inner, batches, key)
        return grads, Wrapped(state.calls + 1, inner), metrics

    wrapper = Defense(lambda adapter: Wrapped(jnp.zeros((), int), T_VACCINE.init(adapter)), gradient,
                      lambda state, adapter: T_VACCINE.trainable(state.inner, adapter), counters=("calls",))
    for found, expected in zip(steps(wrapper, optax.adamw(0.1), toy.trees()[0]),
                               steps(T_VACCINE, optax.adamw(0.1), toy.trees()[0]), strict=True):
        same_bits(found[1], expected[1])
    assert found[2].defense.calls == 5


@pytest.mark.parametrize(("trainable", "message"), [
    (lambda state, adapter: jnp.ones(3, bool), r"trainable: found bool\[3\], expected bool\[4\]"),
    (lambda state, adapter: jnp.ones(4), r"trainable: found float32\[4\], expected bool\[4\]"),
    (lambda state, adapter: {"c": jnp.ones(4, bool)}, "trainable: found a tree that is no prefix of the adapter's")])
def test_what_trains_must_fit_the_adapter(trainable, message):
    defense = defenses.sft(toy.loss_fn)._replace(trainable=trainable)
    with pytest.raises(ValueError, match=message):
        training.init_train_state(toy.trees()[0], defense, ADAMW)


# States


@pytest.mark.parametrize("init", [
    lambda adapter: adapter, lambda adapter: (adapter, adapter), lambda adapter: {"start": adapter["a"], "numbers": 3},
    lambda adapter: (np.arange(4), jax.random.key(1)), lambda adapter: ()])
def test_a_state_of_any_arrays_may_be_donated(init):
    """Also of those that the adapter and the optimizer's state are made of, or that a caller keeps."""
    sft = defenses.sft(toy.no_dropout)

    def gradient(adapter, frozen, state, batches, key):
        grads, _, metrics = sft.gradient(adapter, frozen, (), batches, key)
        return grads, state, metrics

    adapter, frozen = toy.trees()
    optimizer = optax.chain(optax.GradientTransformation(lambda params: params, lambda u, s, p=None: (u, s)), ADAMW)
    kept, defense = jax.tree.map(np.array, adapter), Defense(init, gradient)
    step, state = training.make_train_step(defense, optimizer), training.init_train_state(adapter, defense, optimizer)
    for i in range(2):
        state, _ = step(state, frozen, toy.batches(i), KEY)
    same_bits(adapter, kept)
    same_bits(state.optimizer[0], kept)
    assert (state.adapter["a"] != adapter["a"]).all()


class Counting(NamedTuple):
    seen: jax.Array  # counts steps
    step: jax.Array  # does not


def test_counters_are_those_that_are_declared():
    """By whatever name; another field called `step` is a lane's own."""
    defense = Defense(lambda adapter: Counting(jnp.zeros((), int), jnp.zeros(3)), lambda *args: None)
    for counters, expected in ((("seen",), Counting(None, 0)), ((), Counting(0, 0))):
        declared = defense._replace(counters=counters)
        axes = lane_axes(training.init_train_state(toy.trees()[0], declared, ADAMW), declared)
        assert axes.defense == expected and axes.step is None


@pytest.mark.parametrize("init", [lambda adapter: Counting(jnp.zeros(()), jnp.zeros(3)), lambda adapter: ()])
def test_counters_that_the_state_lacks(init):
    defense = Defense(init, lambda *args: None, counters=("steps",))
    with pytest.raises(ValueError, match=r"counters: found \['steps'\], expected fields of its state"):
        training.init_train_state(toy.trees()[0], defense, ADAMW)


def test_float16_weights_are_refused():
    defense = defenses.sft(toy.no_dropout)
    state = training.init_train_state(toy.trees()[0], defense, ADAMW)
    frozen = {"weights": toy.trees()[1].astype(jnp.float16)}
    with pytest.raises(ValueError, match="frozen: found float16 weights, expected bfloat16 or float32"):
        training.make_train_step(defense, ADAMW)(state, frozen, toy.batches(), KEY)
