"""Greedy decoding in batches, with a key-value cache: a row's tokens do not depend on its padding or neighbours.

Shapes in names: B batch, T padded prompt length, S cached positions, N max_new_tokens, E number of EOS ids.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.data.batching import pad_rows
from jaxvaccine.llama import Cache, Llama, extend_cache, token_logits


class _Decoding(NamedTuple):
    step: jax.Array  # [] int32: columns of tokens decided so far
    cache: Cache
    last: jax.Array  # [B] int32
    tokens: jax.Array  # [B, N] int32
    counts: jax.Array  # [B] int32: tokens before EOS
    ended: jax.Array  # [B] bool
    finite: jax.Array  # [B] bool


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _decode(model: Llama, adapter, frozen, input_ids_BxT, lengths_B, eos_ids_E, *, max_new_tokens: int):
    """Tokens [B, N] of which the first counts [B] are the answer, and whether all logits [B] so far were finite.

    Rows of length 0 are filler: ended from the start.
    """
    batch, length = input_ids_BxT.shape

    def choose(hidden_BxD):
        logits_BxV = token_logits(model, frozen, hidden_BxD)
        token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        # argmax finds a NaN wherever there is one, so its own value tells whether the row is sound.
        return token_B, jnp.isfinite(jnp.take_along_axis(logits_BxV, token_B[:, None], axis=-1)[:, 0])

    def record(state: _Decoding, cache, hidden_BxD) -> _Decoding:
        token_B, sound_B = choose(hidden_BxD)
        finite_B = state.finite & (sound_B | state.ended)
        ended_B = state.ended | ~finite_B | jnp.any(token_B[:, None] == eos_ids_E, axis=-1)
        return _Decoding(state.step + 1, cache, token_B, state.tokens.at[:, state.step].set(token_B),
                         state.counts + ~ended_B, ended_B, finite_B)

    def advance(state: _Decoding) -> _Decoding:
        old, ones = state.cache, jnp.ones((batch, 1), jnp.int32)
        hidden_Bx1xD, new = extend_cache(model, adapter, frozen, state.last[:, None], ones, old)
        # Each row's next slot is behind its own prompt: the padding there is overwritten, never read.
        entries = jax.tree.map(
            lambda x, n: x.at[:, jnp.arange(batch), old.lengths].set(
                n[:, :, 0], unique_indices=True, mode="promise_in_bounds"), old.entries, new)
        return record(state, Cache(entries, old.lengths + 1), hidden_Bx1xD[:, 0])

    mask_BxT = (jnp.arange(length) < jnp.maximum(lengths_B, 1)[:, None]).astype(jnp.int32)
    hidden_BxTxD, entries = extend_cache(model, adapter, frozen, input_ids_BxT, mask_BxT)
    room = [(0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0)]
    cache = Cache(jax.tree.map(lambda x: jnp.pad(x, room), entries), jnp.maximum(lengths_B, 1))
    start = _Decoding(
        step=jnp.zeros((), jnp.int32), cache=cache, last=jnp.zeros(batch, jnp.int32),
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32), counts=jnp.zeros(batch, jnp.int32),
        ended=lengths_B == 0, finite=jnp.ones(batch, bool))
    state = record(start, cache, hidden_BxTxD[jnp.arange(batch), cache.lengths - 1])
    state = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~jnp.all(s.ended), advance, state)
    return state.tokens, state.counts, state.finite


def _checked_prompts(model: Llama, prompts, max_new_tokens: int) -> list[np.ndarray]:
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    arrays = [np.asarray(prompt) for prompt in prompts]
    for i, prompt in enumerate(arrays):
        if prompt.ndim != 1 or not prompt.size:
            raise ValueError(f"generate: prompt {i}: found shape {prompt.shape}, expected [T] with at least one token")
        if not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"generate: prompt {i}: found dtype {prompt.dtype}, expected integer token ids")
        if prompt.size + max_new_tokens > limit:
            raise ValueError(f"generate: prompt {i}: found {prompt.size} tokens + {max_new_tokens} new ones, "
                             f"expected at most the model's max_position_embeddings {limit}")
        wrong = prompt[(prompt < 0) | (prompt >= vocab)]
        if wrong.size:
            raise ValueError(f"generate: prompt {i}: found token id {wrong[0]}, expected 0 <= id < vocab_size {vocab}")
    return arrays


def generate(model: Llama, adapter, frozen, prompts: Sequence[np.ndarray], *, max_new_tokens: int,
             eos_ids: Sequence[int], batch_size: int = 32, bucket: int = 64, progress: bool = False
             ) -> list[np.ndarray]:
    """The most likely next token, again and again, for every prompt.

    Prompts are taken longest first, in batches of ``batch_size``, right-padded to a multiple of ``bucket``: each
    bucket compiles once. A batch stops when all its rows have ended.

    Args:
      model: the architecture; its remat policy is ignored.
      adapter: LoRA tree, leaves stacked [L, ...]; None for the bare base.
      frozen: base weights, layers stacked [L, ...].
      prompts: token ids, integer arrays [T_i].
      max_new_tokens: most tokens generated per prompt.
      eos_ids: any of these ends a row; none never does.
      batch_size: rows decoded together; fewer if there are fewer prompts.
      bucket: multiple, in tokens, to which prompts are padded.
      progress: shows a bar with prompts done and generated tokens per second.

    Returns:
      For each prompt, in the given order, its new tokens, int32 [at most max_new_tokens], without EOS.

    Raises:
      ValueError: before anything runs, for a prompt that is empty, does not fit the model's positions together with
        its answer, or holds an id outside the vocabulary; for an EOS id outside it; for a size below 1.
      FloatingPointError: the model's logits are not finite.
    """
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "bucket": bucket}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"generate: {name}: found {value}, expected at least 1")
    for eos in eos_ids:
        if not isinstance(eos, int | np.integer) or not 0 <= eos < model.config.vocab_size:
            raise ValueError(f"generate: eos_ids: found {eos!r}, expected 0 <= id < vocab_size "
                             f"{model.config.vocab_size}")
    prompts = _checked_prompts(model, prompts, max_new_tokens)
    if not prompts:
        return []
    from tqdm import tqdm

    model = model.clone(remat="none")
    eos_ids_E = np.asarray(tuple(eos_ids), np.int32)
    batch_size = min(batch_size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: -prompts[i].size)
    answers: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    generated = 0
    with tqdm(total=len(prompts), desc="generate", unit="prompt", disable=not progress) as bar:
        for first in range(0, len(prompts), batch_size):
            rows = order[first:first + batch_size]
            input_ids_BxT, lengths_B = pad_rows([prompts[i] for i in rows], batch_size, bucket)
            tokens_BxN, counts_B, finite_B = jax.device_get(_decode(
                model, adapter, frozen, input_ids_BxT, lengths_B, eos_ids_E, max_new_tokens=max_new_tokens))
            for b, i in enumerate(rows):
                if not finite_B[b]:
                    raise FloatingPointError(f"generate: prompt {i}: the model's logits are not finite after "
                                             f"{counts_B[b]} tokens: its weights or activations overflowed")
                answers[i] = tokens_BxN[b, :counts_B[b]]
            generated += int(counts_B.sum())
            bar.set_postfix_str(f"{generated / max(bar.format_dict['elapsed'], 1e-9):.1f} tokens/s", refresh=False)
            bar.update(len(rows))
    return answers
