"""cuDNN's attention, as far as a machine without a GPU can tell: what it is asked for, and what it is not given.

In the kernel's place is JAX's own computation of the same arguments (implementation="xla"); whether the kernel computes
what it is asked for, only a GPU can say.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import attention, causal_lm_loss, llama
from jaxvaccine.llama_config import LlamaConfig
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")
MODELS = {"llama": dataclasses.replace(tiny.CONFIG, head_dim=8),
          "mistral": dataclasses.replace(tiny.FAMILIES["mistral"], head_dim=8)}


@pytest.fixture
def no_kernel(monkeypatch):
    asked = []

    def computed(*arguments, implementation, **given):
        asked.append(implementation)
        return jax_attention(*arguments, implementation="xla", **given)

    jax_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", computed)
    yield asked
    assert set(asked) == {"cudnn"}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_xlas(no_kernel, name):
    """Grouped heads, padding, a window shorter than the rows; outputs and all gradients, where tokens count."""
    config: LlamaConfig = MODELS[name]
    rng = np.random.default_rng(0)
    batch, length = 3, 12
    lengths = jnp.array([12, 7, 1])
    counted = jnp.arange(length) < lengths[:, None]
    q, weight = (jnp.asarray(rng.normal(size=(batch, length, config.num_heads, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(batch, length, config.num_kv_heads, 8)), jnp.float32) for _ in range(2))
    masks = attention.attention_masks(
        config, counted.astype(jnp.int32), (), attention.slot_positions((), batch, length))

    def of(attend, mask):
        @jax.jit
        def total(q, k, v):
            out = attend(config, q, k, v, mask).reshape(q.shape)
            return jnp.where(counted[..., None, None], out * weight, 0).sum(), out

        (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return [jnp.where(counted[..., None, None], out, 0), *grads]

    for found, expected in zip(of(attention.attend_by_cudnn, lengths), of(attention.attend, masks[0]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_with_it(no_kernel):
    """Loss and gradient in bfloat16, a row without a token among the others."""
    config, losses = MODELS["llama"], []
    for kind in ("cudnn", "xla"):
        model = tiny.model(config=config, dtype=jnp.bfloat16).clone(attention=kind)
        adapter, frozen = tiny.trees(model)
        batch = tiny.batch()
        batch = {**batch, "labels": batch["labels"].copy(), "attention_mask": batch["attention_mask"].copy()}
        batch["labels"][0], batch["attention_mask"][0] = -100, 0
        losses.append(jax.jit(jax.value_and_grad(
            lambda a, f, m=model, b=batch: causal_lm_loss(m)(a, f, b)[0]))(adapter, frozen))
    (found, found_grads), (expected, expected_grads) = losses
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert tiny.relative_difference(found_grads, expected_grads) < 0.1  # 8 bits, through four layers and back


@pytest.mark.parametrize("changes, dtype, lacking", [
    ({}, jnp.bfloat16, None), ({}, jnp.float32, "float32"), ({"head_dim": 12}, jnp.bfloat16, "head_dim 12"),
    ({"head_dim": 256}, jnp.bfloat16, "head_dim 256"),
    ({"model_type": "qwen2", "sliding_window": 5, "sliding_layers": (False, True) * 2}, jnp.bfloat16, "window"),
    ({"model_type": "qwen2", "sliding_window": 5, "sliding_layers": (True,) * 4}, jnp.bfloat16, None),
])
def test_what_it_lacks(changes, dtype, lacking):
    found = attention.cudnn_lacks(dataclasses.replace(MODELS["llama"], **changes), dtype)
    assert found is None if lacking is None else lacking in found


def test_gemma2_is_refused():
    model = tiny.model(config=tiny.FAMILIES["gemma2"], dtype=jnp.bfloat16).clone(attention="cudnn")
    shapes = llama.tree_shapes(model)
    with pytest.raises(ValueError, match="attention: found cudnn, expected xla: it has no attn_logit_softcapping"):
        jax.eval_shape(lambda trees: causal_lm_loss(model)(trees["lora"], trees["params"], tiny.batch()), shapes)
