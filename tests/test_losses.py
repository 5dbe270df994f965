"""The loss against log_softmax of the whole batch's logits, all in float64."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import llama, losses
from jaxvaccine.llama_config import LlamaConfig
from tests import jaxprs, tiny

pytestmark = pytest.mark.usefixtures("float64", "quick_compile")

N, D, V = 24, 5, 11
BLOCKS = [1, 7, 24, 100]


def naive_sum(frozen, hidden, targets):
    log_p = jax.nn.log_softmax(hidden @ frozen, axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return -jnp.where(targets >= 0, chosen, 0).sum()


def blocked_sum(block, frozen, hidden, targets):
    return losses.sum_over_targets(losses.block_cross_entropy, lambda w, x: x @ w, frozen, hidden, targets, block)


def head(seed=0):
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random(N) < 0.6, rng.integers(0, V, N), -100)
    return jnp.array(rng.normal(size=(D, V))), jnp.array(rng.normal(size=(N, D))), jnp.array(targets, jnp.int32)


def close(found, expected, rtol=1e-11):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=rtol, atol=rtol), found, expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_sum_and_its_gradients(block):
    arguments = head()
    found = jax.jit(jax.value_and_grad(functools.partial(blocked_sum, block), argnums=(0, 1)))(*arguments)
    close(found, jax.value_and_grad(naive_sum, argnums=(0, 1))(*arguments))
    close(blocked_sum(block, *arguments), found[0])
    one = jax.jit(jax.value_and_grad(functools.partial(blocked_sum, block), argnums=1))(*arguments)
    close(one, (found[0], found[1][1]))


@pytest.mark.parametrize("block", [1, 5, 100])
@pytest.mark.parametrize("inner", [0, 1])
def test_second_derivative(block, inner):
    """Exact Booster differentiates the gradient: d‖∇‖² with respect to weights and hidden states."""
    def curvature(fn):
        def squared(*arguments):
            return (jax.grad(fn, argnums=inner)(*arguments) ** 2).sum()
        return jax.jit(jax.grad(squared, argnums=(0, 1)))

    close(curvature(functools.partial(blocked_sum, block))(*head()), curvature(naive_sum)(*head()))


@pytest.fixture(scope="module")
def compiled_head():
    return jax.jit(jax.value_and_grad(functools.partial(blocked_sum, 5), argnums=(0, 1)))


@hypothesis.settings(max_examples=25)
@hypothesis.given(targets=hnp.arrays(np.int32, N, elements=st.sampled_from([-100, -100, 0, 1, V - 1])))
def test_any_mask(compiled_head, targets):
    frozen, hidden, _ = head()
    close(compiled_head(frozen, hidden, targets), jax.value_and_grad(naive_sum, argnums=(0, 1))(
        frozen, hidden, targets))


@pytest.mark.parametrize("supervised", [0, 1, 8, 9, N])
def test_only_blocks_with_supervised_positions_are_computed(supervised):
    frozen, hidden, _ = head()
    targets = np.full(N, -100, np.int32)
    targets[np.random.default_rng(1).permutation(N)[:supervised]] = 3
    calls = []

    def logits(w, x):
        jax.debug.callback(lambda: calls.append(x.shape))
        return x @ w

    summed = functools.partial(losses.sum_over_targets, losses.block_cross_entropy)
    for fn in (summed, jax.grad(summed, argnums=2)):
        calls.clear()
        jax.block_until_ready(jax.jit(fn, static_argnums=(0, 4))(logits, frozen, hidden, targets, 8))
        jax.effects_barrier()
        assert calls == [(8, D)] * -(-supervised // 8)


@pytest.mark.parametrize("mapped", ["hidden", "targets"])
def test_vmap(mapped):
    """Over hidden states, as a vmap over adapters does, and over targets, where the blocks to skip differ."""
    frozen, *one = head()
    _, *other = head(1)
    axes = (0, None) if mapped == "hidden" else (None, 0)
    rows = [one, [other[0], one[1]] if mapped == "hidden" else [one[0], other[1]]]
    arguments = [jnp.stack([row[i] for row in rows]) if axes[i] == 0 else one[i] for i in range(2)]
    gradient = jax.value_and_grad(functools.partial(blocked_sum, 7), argnums=(0, 1))
    found = jax.jit(jax.vmap(gradient, in_axes=(None, *axes)))(frozen, *arguments)
    expected = [jax.value_and_grad(naive_sum, argnums=(0, 1))(frozen, *row) for row in rows]
    close(found, jax.tree.map(lambda *x: jnp.stack(x), *expected))


def test_memory_is_that_of_a_block():
    count, vocab, block = 512, 2048, 16
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in
              (((D, vocab), jnp.float32), ((count, D), jnp.float32), ((count,), jnp.int32))]

    def scratch(fn):
        return jax.jit(jax.grad(fn, argnums=1)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert scratch(naive_sum) > 4 * count * vocab
    assert scratch(functools.partial(blocked_sum, block)) < 4 * count * vocab / 4


def test_targets():
    labels = np.array([[7, 0, -100, 3], [-100, -100, -100, -100]])
    targets, supervised = losses.supervised_targets(labels)
    np.testing.assert_array_equal(targets, [[0, -100, 3, -100], [-100] * 4])
    np.testing.assert_array_equal(supervised, [[True, False, True, False], [False] * 4])


def naive_loss(model, adapter, frozen, batch):
    hidden = llama.hidden_states(model, adapter, frozen, batch["input_ids"], batch["attention_mask"])
    log_p = jax.nn.log_softmax(llama.token_logits(model, frozen, hidden), axis=-1)[:, :-1]
    labels = batch["labels"][:, 1:]
    chosen = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(labels >= 0, chosen, 0).sum() / (labels >= 0).sum()


CONFIG = {tied: LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
                                 num_kv_heads=1, head_dim=8, tie_word_embeddings=tied) for tied in (True, False)}


def value_and_grad(loss_fn):
    return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def language_model(request):
    model = tiny.model(config=CONFIG[request.param], dtype=jnp.float64, remat="none", targets=("q_proj", "down_proj"))
    return model, *tiny.trees(model), value_and_grad(losses.causal_lm_loss(model, block=7))


def test_language_model(language_model):
    model, adapter, frozen, compiled = language_model
    (loss, aux), grads = compiled(adapter, frozen, tiny.batch())
    expected = jax.jit(jax.value_and_grad(functools.partial(naive_loss, model), argnums=(0, 1)))(
        adapter, frozen, tiny.batch())
    close((loss, grads), expected, rtol=1e-9)
    assert aux["tokens"] == (tiny.batch()["labels"][:, 1:] != -100).sum()
    assert jax.tree.map(jnp.shape, aux["perturbations"]) == {"layers": {"attention": {"output": (2, 3, 16, 16)}}}


def test_finite_differences(language_model):
    _, adapter, frozen, compiled = language_model
    batch = tiny.batch(1)
    _, grads = compiled(adapter, frozen, batch)
    trees = (adapter, frozen)
    for seed in range(3):
        direction = tiny.direction(trees, seed)
        found = tiny.slope(lambda *trees: compiled(*trees, batch)[0][0], trees, direction, 1e-4)
        expected = tiny.dot(grads, direction)
        assert abs(found - expected) < 1e-6 * abs(expected)


def test_a_row_without_labels_contributes_nothing(language_model):
    _, adapter, frozen, compiled = language_model
    batch = tiny.batch()
    batch["labels"][1] = -100
    expected = compiled(adapter, frozen, batch)
    batch["input_ids"][1] = batch["input_ids"][1, ::-1]
    close(compiled(adapter, frozen, batch), expected, rtol=1e-14)
    assert expected[0][1]["tokens"] == (batch["labels"][[0, 2], 1:] != -100).sum()


def test_a_batch_without_labels_has_loss_and_gradient_zero(language_model):
    _, adapter, frozen, compiled = language_model
    batch = tiny.batch()
    batch["labels"][:] = -100
    (loss, aux), grads = compiled(adapter, frozen, batch)
    assert loss == 0 and aux["tokens"] == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_a_label_at_position_0_does_not_count(language_model):
    _, adapter, frozen, compiled = language_model
    batch = tiny.batch()
    expected = compiled(adapter, frozen, batch)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    close(compiled(adapter, frozen, batch), expected, rtol=0)


@pytest.mark.parametrize("language_model", [False], indirect=True, ids=["untied"])
def test_bfloat16(language_model):
    model, adapter, frozen, compiled = language_model
    (expected, _), (expected_grads, _) = compiled(adapter, frozen, tiny.batch())
    low = model.clone(dtype=jnp.bfloat16)
    adapter = jax.tree.map(lambda x: x.astype("float32"), adapter)
    frozen = jax.tree.map(lambda x: x.astype("bfloat16"), frozen)
    (loss, _), (grads, frozen_grads) = value_and_grad(losses.causal_lm_loss(low))(adapter, frozen, tiny.batch())
    assert loss.dtype == jnp.float32 and abs(loss - expected) < 0.03 * expected
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert {g.dtype for g in jax.tree.leaves(frozen_grads)} == {jnp.dtype("bfloat16")}
    assert tiny.relative_difference(grads, expected_grads) < 0.2


def whole_logits(fn, *arguments):
    """Shapes of values of fn's jaxpr that are, or are as large as, the logits of the whole batch."""
    size, vocab = 3 * 16 * 97, 97
    shapes = jaxprs.output_shapes(jaxprs.equations(jax.make_jaxpr(fn)(*arguments)))
    return [s for s in shapes if (vocab in s and np.prod(s) >= size) or np.prod(s) == size]


@pytest.mark.parametrize("derivative", ["none", "first", "second"])
def test_no_logits_of_the_whole_batch(language_model, derivative):
    model, adapter, frozen, _ = language_model
    loss_fn = losses.causal_lm_loss(model, block=7)

    def of(fn):
        if derivative == "none":
            return fn
        if derivative == "first":
            return jax.grad(fn, argnums=(0, 1))
        return jax.grad(lambda *a: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(fn)(*a))))

    arguments = (adapter, frozen, tiny.batch())
    assert not whole_logits(of(lambda *a: loss_fn(*a)[0]), *arguments)
    assert whole_logits(of(functools.partial(naive_loss, model)), *arguments), "the check sees nothing"
