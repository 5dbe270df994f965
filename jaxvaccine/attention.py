"""Attention to what is being read and to what generation remembers (`cache`): pure functions, without weights.

Shapes in names: B batch, T sequence, S slots of keys, N query heads, K key-value heads, G query heads of each of them,
H head_dim, F = G · T.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.cache import Cache, KeyValues
from jaxvaccine.conventions import at_least_float32
from jaxvaccine.llama_config import LlamaConfig
from jaxvaccine.products import einsum_in_full


def soft_cap(x, cap: float | None):
    """cap · tanh(x / cap); x itself for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def slot_positions(cache: Sequence[Cache], batch: int, length: int) -> list[jax.Array]:
    """Position in its row of every slot: of each cache [B, S], and of `length` tokens that follow [B, T]."""
    starts = itertools.accumulate((part.lengths for part in cache), initial=jnp.zeros(batch, jnp.int32))
    sizes = [*(part.size for part in cache), length]
    return [start_B[:, None] + jnp.arange(size) for start_B, size in zip(starts, sizes, strict=True)]


def attention_masks(config: LlamaConfig, attention_mask_BxT, cache: Sequence[Cache], positions: Sequence[jax.Array]
                    ) -> tuple[jax.Array, ...]:
    """Which slots, first the caches' and then those of the tokens being read, each query sees: bool [B, T, S].

    One mask if all layers have the same, else two: of layers without and of layers with a sliding window. A window that
    no two slots can exceed costs nothing.

    Args:
      config: says which layers have a window.
      attention_mask_BxT: 1 where a token counts.
      cache: what was read before, one behind the other.
      positions: as of `slot_positions`.
    """
    batch, length = attention_mask_BxT.shape
    mask_BxTxS = jnp.tril(jnp.ones((length, length), bool)) & attention_mask_BxT[:, None, :].astype(bool)
    seen = [jnp.broadcast_to(jnp.arange(part.size) < part.lengths[:, None, None], (batch, length, part.size))
            for part in cache]
    mask_BxTxS = jnp.concatenate([*seen, mask_BxTxS], axis=-1)
    if not any(config.local_layers) or mask_BxTxS.shape[-1] <= config.sliding_window:
        return (mask_BxTxS,)
    distance_BxTxS = positions[-1][:, :, None] - jnp.concatenate(positions, axis=-1)[:, None, :]
    near_BxTxS = mask_BxTxS & (distance_BxTxS < config.sliding_window)
    return (near_BxTxS,) if all(config.local_layers) else (mask_BxTxS, near_BxTxS)


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angular frequencies [H / 2] in radians per position, with Llama-3's scaling where the config asks for it."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Long wavelengths are slowed down by `factor`, short ones kept, those between interpolated.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def rope_table(config: LlamaConfig, positions_BxT, dtype):
    """Cosines and sines [B, T, 1, H / 2] of the angles at these positions, in at least float32."""
    angles = positions_BxT[:, :, None, None] * jnp.asarray(rope_frequencies(config), at_least_float32(dtype))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxNxH, rope):
    """Queries or keys turned by `rope_table`'s angles, in their own dtype."""
    cos, sin = rope
    first, second = jnp.split(x_BxTxNxH.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxNxH.dtype)


def _weights(config: LlamaConfig, scores_BxKxGxTxS, mask_BxTxS):
    scores_BxKxGxTxS = soft_cap(scores_BxKxGxTxS * config.attention_scale, config.attn_logit_softcapping)
    # Not -inf: a padded query that sees nothing would give NaN.
    masked_BxKxGxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxKxGxTxS, jnp.finfo(scores_BxKxGxTxS.dtype).min)
    return jax.nn.softmax(masked_BxKxGxTxS, axis=-1)


def attend(config: LlamaConfig, q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask_BxTxS):
    """Grouped-query attention, softmax in at least float32 (jax.nn.dot_product_attention's is float32 always)."""
    batch, length, heads, head_dim = q_BxTxNxH.shape
    kv_heads = k_BxSxKxH.shape[2]
    q_BxTxKxGxH = q_BxTxNxH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores_BxKxGxTxS = einsum_in_full("BTKGH,BSKH->BKGTS", q_BxTxKxGxH, k_BxSxKxH)
    weights_BxKxGxTxS = _weights(config, scores_BxKxGxTxS, mask_BxTxS).astype(v_BxSxKxH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BxKxGxTxS, v_BxSxKxH)


def cudnn_lacks(config: LlamaConfig, dtype) -> str | None:
    """What in this model cuDNN's kernel does not compute; None if it computes all."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"{jnp.dtype(dtype).name}; bfloat16 is what it reads"
    if config.attn_logit_softcapping is not None:
        return "attn_logit_softcapping"
    if len(set(config.local_layers)) == 2:
        return "a sliding window in some layers and not in others"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"head_dim {config.head_dim}; multiples of 8 up to 128 are what it reads"
    return None


def attend_by_cudnn(config: LlamaConfig, q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, lengths_B):
    """`attend` by cuDNN's kernel on a GPU, which holds no scores [T, T]; for models of which it lacks nothing.

    lengths_B: int32, at least 1: how many tokens of each row count, the first ones.
    """
    window = (config.sliding_window - 1, 0) if any(config.local_layers) else None
    return jax.nn.dot_product_attention(
        q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, scale=config.attention_scale, is_causal=True,
        key_value_seq_lengths=lengths_B, local_window_size=window, implementation="cudnn")


def attend_to_cache(config: LlamaConfig, q_BxTxNxH, new: KeyValues, cached: Sequence[KeyValues], mask_BxTxS):
    """`attend` to what is cached, of B rows or of one that all share, then to the new keys and values.

    They are never joined, which would copy the cache for every token, and both products are plain matrix products:
    XLA's CPU backend turns an einsum's operands around, and takes twice as long.
    """
    batch, length, heads, head_dim = q_BxTxNxH.shape
    kv_heads, dtype = new.k.shape[1], at_least_float32(q_BxTxNxH.dtype)
    grouped = (batch, kv_heads, heads // kv_heads, length)
    flat = (batch, kv_heads, heads // kv_heads * length)
    q_BxKxGxTxH = q_BxTxNxH.reshape(batch, length, *grouped[1:3], head_dim).transpose(0, 2, 3, 1, 4)
    q_BxKxFxH = q_BxKxGxTxH.reshape(*flat, head_dim)
    parts = [*cached, new]
    scores_BxKxFxS = jnp.concatenate(
        [jnp.matmul(q_BxKxFxH, part.k, preferred_element_type=dtype) for part in parts], axis=-1)
    weights_BxKxGxTxS = _weights(config, scores_BxKxFxS.reshape(*grouped, -1), mask_BxTxS).astype(new.v.dtype)
    ends = np.cumsum([part.k.shape[-1] for part in parts])[:-1]
    out_BxKxFxH = sum(
        jnp.matmul(weights, part.v, preferred_element_type=dtype)
        for weights, part in zip(jnp.split(weights_BxKxGxTxS.reshape(*flat, -1), ends, axis=-1), parts, strict=True))
    return out_BxKxFxH.astype(new.v.dtype).reshape(*grouped, head_dim).transpose(0, 3, 1, 2, 4)
