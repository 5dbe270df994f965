"""Losses that read hidden states, against the same from all of the model's arrays, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.parity import steps as parity
from jaxvaccine import activation_losses, attention, llama, losses
from jaxvaccine.llama_config import LlamaConfig
from tests import jaxprs, tiny

pytestmark = pytest.mark.usefixtures("float64", "quick_compile")

L, D, V = 2, 16, 97
CONFIG = LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=24, num_layers=L, num_heads=2, num_kv_heads=1,
                     head_dim=8)
MODEL = tiny.model(config=CONFIG, dtype=jnp.float64, remat="full", targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def trees():
    adapter, frozen = tiny.trees(MODEL)
    return adapter, jax.tree.map(lambda x: 0.5 * x, adapter), frozen


@pytest.fixture(scope="module")
def pair():
    harmful = tiny.batch(0)
    return harmful, parity.other_answers(np.random.default_rng(0), harmful)


def layer_by_layer(adapter, frozen, batch):
    """(inputs, MLP outputs, final) by running models that are cut off after each layer."""
    def first(tree, count):
        return {**tree, "layers": jax.tree.map(lambda x: x[:count], tree["layers"])}

    ids, mask = batch["input_ids"], batch["attention_mask"]
    identity = {**frozen, "norm": frozen["norm"]}
    states = [frozen["embed_tokens"][ids]]
    final = llama.hidden_states(MODEL, adapter, frozen, ids, mask)
    for count in range(1, L + 1):
        cut = MODEL.clone(config=LlamaConfig(**{**CONFIG.__dict__, "num_layers": count}))
        variables = {"params": first(identity, count), "lora": first(adapter, count)}
        states.append(cut.apply(variables, ids, mask, method=unnormed)[0])
    return states, final


def unnormed(module, ids, mask):
    """The residual stream after the last layer."""
    length = ids.shape[1]
    rope = attention.rope_table(module.config, jnp.zeros((len(ids), 1), int) + jnp.arange(length), module.dtype)
    causal = jnp.tril(jnp.ones((length, length), bool)) & mask[:, None].astype(bool)
    return module.layers(module.embed_tokens[ids], rope, (causal,), (), None, None)


def test_activations(trees, pair):
    adapter, _, frozen = trees
    found = llama.layer_activations(MODEL, adapter, frozen, pair[0]["input_ids"], pair[0]["attention_mask"])
    states, final = layer_by_layer(adapter, frozen, pair[0])
    np.testing.assert_allclose(found.inputs, states[:-1], rtol=1e-10)
    np.testing.assert_allclose(found.final, final, rtol=1e-10)
    assert found.mlp.shape == (L, 3, 16, D)
    logits = llama.read_out(MODEL, frozen, states[-1])
    np.testing.assert_allclose(logits, llama.token_logits(MODEL, frozen, final), rtol=1e-10)


def test_nothing_is_kept_unless_asked_for(trees, pair):
    """The usual forward pass has no output of the layers' loop for each layer but keys and values."""
    adapter, _, frozen = trees
    inputs = pair[0]["input_ids"], pair[0]["attention_mask"]
    shape = (L, 3, 16, D)

    def stacked(fn):
        return sum(s == shape for s in jaxprs.output_shapes(
            e for e in jaxprs.live_equations(fn, adapter) if e.primitive.name == "scan"))

    assert stacked(lambda adapter: llama.hidden_states(MODEL, adapter, frozen, *inputs)) == 0
    assert stacked(lambda adapter: llama.layer_activations(MODEL, adapter, frozen, *inputs)) == 2


def naive_cross_entropy(logits, targets):
    log_p = jax.nn.log_softmax(logits)[:, :-1]
    targets = targets[:, 1:]
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(targets >= 0, picked, 0).sum() / (targets >= 0).sum()


def naive_mmd(x, y):
    """Pair by pair."""
    rows = [*x, *y]
    n = len(rows)
    distance = [[((a - b) ** 2).sum() for b in rows] for a in rows]
    mean = jax.lax.stop_gradient(sum(map(sum, distance)) / (n * n - n))
    total = 0.0
    for i in range(n):
        for j in range(n):
            sign = 1 if (i < len(x)) == (j < len(x)) else -1
            total += sign * sum(jnp.exp(-distance[i][j] / (mean * 2.0**k)) for k in range(-2, 3))
    return total / len(x) ** 2


def test_mmd():
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(3, 7))), jnp.asarray(0.3 * rng.normal(size=(3, 7)))
    found = jax.value_and_grad(activation_losses.squared_mmd, argnums=(0, 1))(x, y)
    expected = jax.value_and_grad(naive_mmd, argnums=(0, 1))(x, y)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-9, atol=1e-12), found, expected)
    assert abs(activation_losses.squared_mmd(x, x)) < 1e-12
    value, grads = jax.value_and_grad(activation_losses.squared_mmd)(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    assert value == 0 and (grads == 0).all()


def naive_terms(adapter, frozen, harmful, harmless, noise_key, mask):
    a = llama.layer_activations(MODEL, adapter, frozen, harmful["input_ids"], harmful["attention_mask"])
    targets = jnp.where(mask, harmful["input_ids"], -100)
    noise = jnp.stack([activation_losses.layer_noise(noise_key, i, a.final.shape, jnp.float64) for i in range(L)])
    rows = [(x * mask[..., None]).reshape(L, x.shape[1], -1) for x in (a.mlp, noise)]
    logits = [llama.read_out(MODEL, frozen, x) for x in a.inputs] + [llama.token_logits(MODEL, frozen, a.final)]
    return (sum(naive_mmd(x, y) for x, y in zip(*rows, strict=True)) / L,
            sum(naive_cross_entropy(x, targets) for x in logits) / (L + 1))


def summed_terms(fn, adapter, *args):
    noise, ascent = fn(adapter, *args)
    return 0.3 * noise + ascent, (noise, ascent)


def test_noise_and_ascent(trees, pair):
    adapter, _, frozen = trees
    key = jax.random.key(3)
    terms = activation_losses.noise_and_ascent(MODEL, block=7)
    mask = np.zeros((3, 16), bool)
    for row in range(3):
        for t in range(16):
            supervised = pair[0]["labels"][row, t] != -100
            other = pair[1]["input_ids"][row, t] if pair[1]["attention_mask"][row, t] else None
            mask[row, t] = supervised and pair[0]["input_ids"][row, t] != other
    assert 0 < mask.sum() < (pair[0]["labels"] != -100).sum(), "some tokens are the same"
    np.testing.assert_array_equal(activation_losses.differing_tokens(*pair), mask)
    found = jax.jit(jax.value_and_grad(functools.partial(summed_terms, terms), has_aux=True))(
        adapter, frozen, *pair, key)
    expected = jax.value_and_grad(functools.partial(summed_terms, naive_terms), has_aux=True)(
        adapter, frozen, *pair, key, mask)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-8, atol=1e-10), found, expected)


def test_rows_that_do_not_differ_contribute_nothing(trees, pair):
    adapter, _, frozen = trees
    terms = activation_losses.noise_and_ascent(MODEL, block=7)
    value, grads = jax.jit(jax.value_and_grad(
        lambda adapter: sum(terms(adapter, frozen, pair[0], pair[0], jax.random.key(0)))))(adapter)
    assert value == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


def test_no_logits_of_a_whole_batch(trees, pair):
    adapter, _, frozen = trees
    terms = activation_losses.noise_and_ascent(MODEL, block=7)
    shapes = jaxprs.output_shapes(jaxprs.equations(jax.make_jaxpr(jax.grad(
        lambda adapter: sum(terms(adapter, frozen, *pair, jax.random.key(0)))))(adapter)))
    assert any(V in s for s in shapes)
    assert max(int(np.prod(s)) for s in shapes if V in s) <= max(7 * V, V * D)


def test_hidden_distance(trees):
    adapter, reference, frozen = trees
    batch = tiny.batch(1)

    def naive(adapter):
        inputs = batch["input_ids"], batch["attention_mask"]
        a, b = (llama.layer_activations(MODEL, of, frozen, *inputs) for of in (adapter, reference))
        states = zip([*a.inputs[1:], a.final], [*b.inputs[1:], b.final], strict=True)
        distance = sum(jnp.sqrt(((x - y) ** 2).sum(axis=-1))[batch["attention_mask"] == 1].mean() for x, y in states)
        loss, _ = losses.causal_lm_loss(MODEL)(adapter, frozen, batch)
        return loss + distance / (L + 1), (loss, distance / (L + 1))

    def ours(adapter):
        found = activation_losses.loss_and_hidden_distance(MODEL, block=7)(adapter, frozen, batch, reference)
        return sum(found), found

    found, expected = (jax.jit(jax.value_and_grad(fn, has_aux=True))(adapter) for fn in (ours, naive))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-8, atol=1e-12), found, expected)


def test_hidden_distance_at_the_start(trees):
    """The distance is 0 there, and so is its gradient."""
    adapter, _, frozen = trees
    fn = activation_losses.loss_and_hidden_distance(MODEL)
    distance, grads = jax.jit(jax.value_and_grad(lambda w: fn(w, frozen, tiny.batch(1), adapter)[1]))(adapter)
    assert distance == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["entropy", "kl"])
def test_losses_of_whole_distributions(name, trees):
    adapter, reference, frozen = trees
    batch = tiny.batch(2)

    def log_p(adapter):
        hidden = llama.hidden_states(MODEL, adapter, frozen, batch["input_ids"], batch["attention_mask"])
        return jax.nn.log_softmax(llama.token_logits(MODEL, frozen, hidden))[:, :-1][batch["labels"][:, 1:] != -100]

    def naive(adapter):
        p = log_p(adapter)
        if name == "entropy":
            return (jnp.exp(p) * p).sum(axis=-1).mean()
        r = log_p(reference)
        return losses.causal_lm_loss(MODEL)(adapter, frozen, batch)[0] + (jnp.exp(r) * (r - p)).sum(axis=-1).mean()

    def ours(adapter):
        if name == "entropy":
            return losses.negative_entropy(MODEL, block=7)(adapter, frozen, batch)[0]
        return sum(losses.loss_and_kl(MODEL, block=7)(adapter, frozen, batch, reference))

    found, expected = (jax.jit(jax.value_and_grad(fn))(adapter) for fn in (ours, naive))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-9, atol=1e-12), found, expected)
