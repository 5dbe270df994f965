"""All weights as a tree that trains: its form, its losses, its dtype, and some of its layers alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvaccine import llama, losses, optim, training
from jaxvaccine.attacks import all_weights
from jaxvaccine.experiment.attack import estimator
from jaxvaccine.experiment.methods import Kl, Lisa, Undefended
from jaxvaccine.experiment.objectives import Plain
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")
TIED = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def bare(config=tiny.CONFIG, dtype=jnp.float32, **fields):
    return llama.Llama(config, dtype=dtype, **fields)


@pytest.mark.parametrize("config, dtype", [
    (tiny.CONFIG, jnp.float32), (TIED, jnp.bfloat16), (tiny.FAMILIES["qwen2"], jnp.float32),
    (tiny.FAMILIES["gemma2"], jnp.bfloat16)])
def test_stacked_and_back(config, dtype):
    """Every leaf has layers on axis 0, one or L of them, in float32; and nothing is lost."""
    model = bare(config, dtype)
    frozen = llama.init_frozen(model, jax.random.key(0))
    weights = all_weights.to_train(frozen)
    equal(all_weights.unstacked(all_weights.stacked(frozen)), frozen)
    equal(all_weights.to_model(model, weights), frozen)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        assert leaf.dtype == jnp.float32
        assert leaf.shape[0] == (config.num_layers if path[0].key == "layers" else 1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), weights) == jax.tree.map(
        lambda x: (x.shape, x.dtype), all_weights.shapes(model))


@pytest.mark.parametrize("config, size", [(tiny.CONFIG, 0), (TIED, 2)])
def test_the_loss_is_the_models(config, size):
    model = bare(config, microbatch_size=size)
    frozen, batch = llama.init_frozen(model, jax.random.key(0)), tiny.batch()
    expected, _ = jax.jit(losses.causal_lm_loss(model.clone(microbatch_size=0)))(None, frozen, batch)
    found, aux = jax.jit(all_weights.causal_lm_loss(model))(all_weights.to_train(frozen), {}, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert aux["tokens"] == (batch["labels"][:, 1:] != -100).sum()


def numpy_kl(model, own, reference, batch):
    """The mean over supervised positions of KL(reference ‖ own), of logits of the whole batch."""
    log_p, log_r = (np.asarray(jax.jit(lambda of: jax.nn.log_softmax(llama.token_logits(model, of, llama.hidden_states(
        model, None, of, batch["input_ids"], batch["attention_mask"]))))(of)) for of in (own, reference))
    where = batch["labels"][:, 1:] != -100
    return (np.exp(log_r) * (log_r - log_p)).sum(-1)[:, :-1][where].mean()


@pytest.mark.parametrize("config, size", [
    pytest.param(tiny.CONFIG, 0, marks=pytest.mark.long), (TIED, 2)])
def test_kl_is_of_two_models(config, size):
    """Each has its own head; against NumPy, and its gradient against finite differences."""
    with jax.enable_x64(True):
        model = bare(config, jnp.float64, microbatch_size=size)
        start = all_weights.to_train(jax.tree.map(
            lambda x: 8 * x if x.ndim == 3 else x, llama.init_frozen(model, jax.random.key(0))))
        weights = jax.tree.map(lambda x, d: x + 0.5 * d, start, tiny.direction(start))
        batch, fn = tiny.batch(), jax.jit(all_weights.loss_and_kl(model, block=4))
        _, kl = fn(weights, {}, batch, start)
        own, reference = (all_weights.to_model(model, of) for of in (weights, start))
        np.testing.assert_allclose(kl, numpy_kl(model, own, reference, batch), rtol=1e-9)
        assert kl > 1e-4
        assert abs(fn(start, {}, batch, start)[1]) < 1e-12
        along = tiny.direction(weights, 1)
        grads, held = jax.jit(jax.grad(lambda w, s: sum(fn(w, {}, batch, s)), argnums=(0, 1)))(weights, start)
        slope = tiny.slope(lambda w: sum(fn(w, {}, batch, start)), (weights,), (along,), 1e-3)
        np.testing.assert_allclose(tiny.dot(grads, along), slope, rtol=1e-6)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(held)), "the reference is held constant"


METHODS = {"none": Undefended(), "lisa": Lisa(alignment_steps=1, user_steps=2), "kl": Kl(0.3)}


def train(model, method, layers=None, steps=4, learning_rate=1e-2):
    start = all_weights.to_train(llama.init_frozen(model, jax.random.key(0)))
    defense = estimator(Plain(), method, model, steps, None, layers)
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(learning_rate), steps)
    state, step = training.init_train_state(start, defense, optimizer), training.make_train_step(defense, optimizer)
    for i in range(steps):
        state, metrics = step(state, {}, {"user": tiny.batch(i), "alignment": tiny.batch(10 + i)}, jax.random.key(0))
        assert np.isfinite(metrics["loss"])
    return start, state.adapter


@pytest.mark.long
def test_methods_of_the_provider():
    """They take any tree: all of it moves, and not as without them."""
    found = {}
    for name, method in METHODS.items():
        start, found[name] = train(bare(), method)
        assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(*map(jax.tree.leaves, (start, found[name])), strict=True))
    assert min(tiny.relative_difference(found[name], found["none"]) for name in ("lisa", "kl")) > 1e-4


@pytest.mark.parametrize("method", ["none", pytest.param("lisa", marks=pytest.mark.long)])
def test_only_layers(method):
    """The others are the same bit for bit, and so are embedding, last norm and head."""
    layers = np.array([False, True, False, True])
    start, trained = train(bare(), METHODS[method], layers)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(trained), strict=True):
        moved = [bool((a != b).any()) for a, b in zip(x, y, strict=True)]
        assert moved == (layers.tolist() if path[0].key == "layers" else [False]), path


def test_small_steps_of_bfloat16_weights():
    """A step of a thousandth of a bfloat16 digit is kept, and after enough of them the model is another."""
    model = bare(dtype=jnp.bfloat16)
    start, trained = train(model, Undefended(), learning_rate=1e-6)
    moved = [np.mean(x != y) for x, y in zip(*map(jax.tree.leaves, (start, trained)), strict=True)]
    assert min(moved) > 0.5
    same = [np.mean(x == y) for x, y in zip(*(jax.tree.leaves(all_weights.to_model(model, of))
                                              for of in (start, trained)), strict=True)]
    assert min(same[i] for i in range(len(same))) > 0.5, "in bfloat16 they are nothing"


def test_an_optimizer_sees_whole_matrices():
    """What maps over axis 0 gets an embedding as one matrix, and not its rows."""
    shapes = []

    def update(updates, state, params=None):
        shapes.append(updates.shape)
        return updates, state

    weights = all_weights.to_train(llama.init_frozen(bare(TIED), jax.random.key(0)))
    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    optimizer = optim.layer_masked(inner)
    optimizer.update(weights, optimizer.init(weights), weights)
    assert shapes[0] == (TIED.vocab_size, TIED.hidden_size)
    assert (TIED.hidden_size, TIED.intermediate_size) in shapes
