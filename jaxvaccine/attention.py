"""Attention to what is being read and to what generation remembers: pure functions, without weights.

Shapes in names: B batch, T sequence, S slots of keys, N query heads, K key-value heads, G query heads of each of them,
H head_dim, F = G · T.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.conventions import at_least_float32
from jaxvaccine.llama_config import LlamaConfig


class KeyValues(NamedTuple):
    """Keys (rotated) and values of T tokens as they are computed: of all layers [L, B, T, K, H], of one [B, T, K, H].

    Of an unrolled model: tuples of L arrays.
    """

    k: Any
    v: Any


class Segment(NamedTuple):
    """A stretch of what generation remembers of each row, of which the first lengths[b] slots count.

    B is 1 for a stretch that all rows share.

    Both products of attention read it as it lies: in another order, XLA's CPU backend takes three times as long.
    """

    k: Any  # [L, B, K, H, S], or a tuple of L arrays
    v: Any  # [L, B, K, S, H], or a tuple of L arrays
    lengths: jax.Array  # [B] int32

    @property
    def size(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[-1]


def soft_cap(x, cap: float | None):
    """cap · tanh(x / cap); x itself for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def slot_positions(cache: Sequence[Segment], batch: int, length: int) -> list[jax.Array]:
    """Position in its row of every slot: of each segment [B, S], and of `length` tokens that follow [B, T]."""
    starts = itertools.accumulate((segment.lengths for segment in cache), initial=jnp.zeros(batch, jnp.int32))
    sizes = [*(segment.size for segment in cache), length]
    return [start_B[:, None] + jnp.arange(size) for start_B, size in zip(starts, sizes, strict=True)]


def attention_masks(config: LlamaConfig, attention_mask_BxT, cache: Sequence[Segment], positions: Sequence[jax.Array]
                    ) -> tuple[jax.Array, ...]:
    """Which slots, first the cache's and then those of the tokens being read, each query sees: bool [B, T, S].

    One mask if all layers have the same, else two: of layers without and of layers with a sliding window. A window that
    no two slots can exceed costs nothing.

    Args:
      config: says which layers have a window.
      attention_mask_BxT: 1 where a token counts.
      cache: what was read before.
      positions: as of `slot_positions`.
    """
    batch, length = attention_mask_BxT.shape
    mask_BxTxS = jnp.tril(jnp.ones((length, length), bool)) & attention_mask_BxT[:, None, :].astype(bool)
    seen = [jnp.broadcast_to(jnp.arange(segment.size) < segment.lengths[:, None, None], (batch, length, segment.size))
            for segment in cache]
    mask_BxTxS = jnp.concatenate([*seen, mask_BxTxS], axis=-1)
    if not any(config.local_layers) or mask_BxTxS.shape[-1] <= config.sliding_window:
        return (mask_BxTxS,)
    distance_BxTxS = positions[-1][:, :, None] - jnp.concatenate(positions, axis=-1)[:, None, :]
    near_BxTxS = mask_BxTxS & (distance_BxTxS < config.sliding_window)
    return (near_BxTxS,) if all(config.local_layers) else (mask_BxTxS, near_BxTxS)


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
    scores_BxKxGxTxS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BxTxKxGxH, k_BxSxKxH,
                                  preferred_element_type=at_least_float32(q_BxTxNxH.dtype))
    weights_BxKxGxTxS = _weights(config, scores_BxKxGxTxS, mask_BxTxS).astype(v_BxSxKxH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BxKxGxTxS, v_BxSxKxH)


def attend_to_cache(config: LlamaConfig, q_BxTxNxH, new: KeyValues, cached: Sequence[KeyValues], mask_BxTxS):
    """`attend` to the cached stretches (k [B or 1, K, H, S], v [B or 1, K, S, H]), then to the new keys and values.

    The stretches are never joined, which would copy the cache for every token, and both products are plain matrix
    products: XLA's CPU backend turns an einsum's operands around, and takes twice as long.
    """
    batch, length, heads, head_dim = q_BxTxNxH.shape
    kv_heads, dtype = new.k.shape[2], at_least_float32(q_BxTxNxH.dtype)
    grouped = (batch, kv_heads, heads // kv_heads, length)
    flat = (batch, kv_heads, heads // kv_heads * length)
    q_BxKxGxTxH = q_BxTxNxH.reshape(batch, length, *grouped[1:3], head_dim).transpose(0, 2, 3, 1, 4)
    q_BxKxFxH = q_BxKxGxTxH.reshape(*flat, head_dim)
    parts = [*cached, KeyValues(new.k.transpose(0, 2, 3, 1), new.v.transpose(0, 2, 1, 3))]
    scores_BxKxFxS = jnp.concatenate(
        [jnp.matmul(q_BxKxFxH, part.k, preferred_element_type=dtype) for part in parts], axis=-1)
    weights_BxKxGxTxS = _weights(config, scores_BxKxFxS.reshape(*grouped, -1), mask_BxTxS).astype(new.v.dtype)
    ends = np.cumsum([part.k.shape[-1] for part in parts])[:-1]
    out_BxKxFxH = sum(
        jnp.matmul(weights, part.v, preferred_element_type=dtype)
        for weights, part in zip(jnp.split(weights_BxKxGxTxS.reshape(*flat, -1), ends, axis=-1), parts, strict=True))
    return out_BxKxFxH.astype(new.v.dtype).reshape(*grouped, head_dim).transpose(0, 3, 1, 2, 4)
