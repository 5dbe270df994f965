"""Decoding in batches, with a key-value cache: a row's tokens do not depend on its padding or neighbours.

Shapes in names: B rows decoded together, G prompts that join them, T padded prompt length, S cached positions, N
max_new_tokens, E number of EOS ids.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.data.batching import bucket_length, pad_rows
from jaxvaccine.evaluation.sampling import GREEDY, Sampling, choose
from jaxvaccine.llama import Llama, Segment, as_segment, extend_cache, token_logits, unroll_layers

# Tokens between two looks at which rows have ended. More waste work on ended rows; fewer, on looking.
BLOCK = 8
# Waiting prompts join when an eighth of the rows is free.
_JOIN = 8
# A smaller batch is hardly faster: a step takes as long as reading the weights.
_SMALLEST = 8
_FREE = -1


class _Rows(NamedTuple):
    """Answers under way, one per row."""

    prompt: jax.Array  # [B] int32: its number
    last: jax.Array  # [B] int32
    tokens: jax.Array  # [B, N] int32
    counts: jax.Array  # [B] int32: tokens before EOS
    ended: jax.Array  # [B] bool
    finite: jax.Array  # [B] bool


def _fresh_rows(prompt_B, ended_B, max_new_tokens: int) -> _Rows:
    zeros_B = jnp.zeros_like(prompt_B)
    return _Rows(prompt_B, zeros_B, jnp.zeros((len(prompt_B), max_new_tokens), jnp.int32), zeros_B, ended_B,
                 jnp.ones_like(ended_B))


def _record(model: Llama, frozen, rows: _Rows, hidden_BxD, eos_ids_E, sampling: Sampling) -> _Rows:
    """One more token for every row, from its last hidden state."""
    token_B, sound_B = choose(token_logits(model, frozen, hidden_BxD), rows.prompt, rows.counts, sampling)
    finite_B = rows.finite & (sound_B | rows.ended)
    ended_B = rows.ended | ~finite_B | jnp.any(token_B[:, None] == eos_ids_E, axis=-1)
    tokens_BxN = rows.tokens.at[jnp.arange(len(token_B)), rows.counts].set(token_B, mode="drop")
    counts_B = rows.counts + ~ended_B
    return _Rows(rows.prompt, token_B, tokens_BxN, counts_B, ended_B | (counts_B == tokens_BxN.shape[1]), finite_B)


def _empty_segment(model: Llama, batch: int, capacity: int) -> Segment:
    config = model.config
    heads = (batch, config.num_kv_heads)
    k, v = (*heads, config.head_dim, capacity), (*heads, capacity, config.head_dim)

    def zeros(shape):
        if model.unroll:
            return tuple(jnp.zeros(shape, model.dtype) for _ in range(config.num_layers))
        return jnp.zeros((config.num_layers, *shape), model.dtype)

    return Segment(zeros(k), zeros(v), jnp.zeros(batch, jnp.int32))


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity", "max_new_tokens"))
def _empty(model: Llama, *, batch: int, capacity: int, max_new_tokens: int) -> tuple[_Rows, Segment]:
    """Rows that have all ended, and their cache."""
    rows = _fresh_rows(jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), max_new_tokens)
    return rows, _empty_segment(model, batch, capacity)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames=("rows", "cache"))
def _admit(model: Llama, adapter, frozen, rows: _Rows, cache: Segment, input_ids_GxT, lengths_G, prompts_G, slots_G,
           eos_ids_E, *, sampling: Sampling) -> tuple[_Rows, Segment]:
    """Prompts take over the rows `slots`, each with its first token. Slots beyond the last row hold filler."""
    length = input_ids_GxT.shape[1]
    lengths_G = jnp.maximum(lengths_G, 1)
    mask_GxT = (jnp.arange(length) < lengths_G[:, None]).astype(jnp.int32)
    hidden_GxTxD, entries = extend_cache(model, adapter, frozen, input_ids_GxT, mask_GxT)
    joining = _record(model, frozen, _fresh_rows(prompts_G, jnp.zeros(len(prompts_G), bool), rows.tokens.shape[1]),
                      hidden_GxTxD[jnp.arange(len(lengths_G)), lengths_G - 1], eos_ids_E, sampling)
    new = as_segment(entries, lengths_G)
    if isinstance(cache.k, tuple):
        new = new._replace(k=tuple(new.k), v=tuple(new.v))
    return jax.tree.map(lambda old, new: old.at[slots_G].set(new, mode="drop"), rows, joining), Segment(
        jax.tree.map(lambda old, new: old.at[..., slots_G, :, :, :length].set(new, mode="drop"), cache.k, new.k),
        jax.tree.map(lambda old, new: old.at[..., slots_G, :, :length, :].set(new, mode="drop"), cache.v, new.v),
        cache.lengths.at[slots_G].set(new.lengths, mode="drop"))


@functools.partial(jax.jit, static_argnames=("model", "steps", "sampling"), donate_argnames=("rows", "cache"))
def _decode(model: Llama, adapter, frozen, rows: _Rows, cache: Segment, eos_ids_E, *, steps: int, sampling: Sampling
            ) -> tuple[_Rows, Segment]:
    """Up to `steps` more tokens for every row; fewer when all have ended.

    The cache itself is only read until the end. What is new lies in a short segment of its own, in the same slots for
    all rows: to write every token where it belongs would take about as long as all of attention.
    """
    ones_Bx1 = jnp.ones((len(rows.last), 1), jnp.int32)

    def put(old, new, at, axis):
        return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis), old, new)

    def advance(state: tuple[jax.Array, _Rows, Segment]):
        step, rows, recent = state
        hidden_Bx1xD, entries = extend_cache(model, adapter, frozen, rows.last[:, None], ones_Bx1, (cache, recent))
        new = as_segment(entries, recent.lengths + 1)
        recent = Segment(put(recent.k, new.k, step, -1), put(recent.v, new.v, step, -2), new.lengths)
        return step + 1, _record(model, frozen, rows, hidden_Bx1xD[:, 0], eos_ids_E, sampling), recent

    start = jnp.zeros((), jnp.int32), rows, _empty_segment(model, len(rows.last), steps)
    _, rows, recent = jax.lax.while_loop(lambda state: (state[0] < steps) & ~jnp.all(state[1].ended), advance, start)
    append_k, append_v = (jax.vmap(functools.partial(put, axis=axis), in_axes=(-4, -4, 0), out_axes=-4)
                          for axis in (-1, -2))
    return rows, Segment(append_k(cache.k, recent.k, cache.lengths), append_v(cache.v, recent.v, cache.lengths),
                         cache.lengths + recent.lengths)


@functools.partial(jax.jit, static_argnames="capacity")
def _keep(rows: _Rows, cache: Segment, slots_B, *, capacity: int) -> tuple[_Rows, Segment]:
    """The rows `slots` alone, with room for `capacity` positions."""
    return jax.tree.map(lambda x: x[slots_B], rows), Segment(
        jax.tree.map(lambda x: x[..., slots_B, :, :, :capacity], cache.k),
        jax.tree.map(lambda x: x[..., slots_B, :, :capacity, :], cache.v), cache.lengths[slots_B])


@functools.partial(jax.jit, static_argnames="model")
def _unrolled(model: Llama, adapter, frozen):
    return adapter and unroll_layers(model, adapter), unroll_layers(model, frozen)


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
             eos_ids: Sequence[int], batch_size: int = 32, bucket: int = 64, sampling: Sampling = GREEDY,
             progress: bool = False) -> list[np.ndarray]:
    """The most likely next token, or a drawn one, again and again, for every prompt.

    Prompts are taken longest first, right-padded to a multiple of ``bucket``. At most ``batch_size`` rows are decoded
    together, in blocks of BLOCK tokens; after a block, rows that have ended leave, and waiting prompts take their
    places. When none waits any more and half of the rows have ended, the others go on in a smaller batch; when half of
    the cache's positions are enough for all that is left, the rest is given up. Reading prompts is compiled once per
    bucket, a step once per size of the batch and of the cache. On a CPU, the weights are held twice meanwhile.

    Args:
      model: the architecture; its remat policy is ignored.
      adapter: LoRA tree, leaves stacked [L, ...]; None for the bare base.
      frozen: base weights, layers stacked [L, ...].
      prompts: token ids, integer arrays [T_i].
      max_new_tokens: most tokens generated per prompt.
      eos_ids: any of these ends a row; none never does.
      batch_size: rows decoded together; fewer if there are fewer prompts.
      bucket: multiple, in tokens, to which prompts are padded.
      sampling: how a token is chosen. Draws derive from its seed, the prompt's place in ``prompts`` and the token's
        place in the answer.
      progress: shows a bar with prompts done, time left and generated tokens per second.

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
    stepwise, trees = model, (adapter, frozen)
    if jax.default_backend() == "cpu":
        stepwise = model.clone(unroll=True)
        trees = _unrolled(model, adapter, frozen)
    eos_ids_E = np.asarray(tuple(eos_ids), np.int32)
    waiting = sorted(range(len(prompts)), key=lambda i: prompts[i].size)  # the longest is taken first, from the end
    answers: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    owners = [_FREE] * min(batch_size, len(prompts))  # which prompt each row is at
    joining = -(-len(owners) // _JOIN)
    steps, generated = min(BLOCK, max_new_tokens), 0

    def capacity(owned: Sequence[int]) -> int:
        return bucket_length(max(prompts[i].size for i in owned) + max_new_tokens + steps, bucket)

    room = capacity(waiting)
    rows, cache = _empty(stepwise, batch=len(owners), capacity=room, max_new_tokens=max_new_tokens)
    with tqdm(total=len(prompts), desc="generate", unit="prompt", disable=not progress) as bar:
        while waiting or any(i != _FREE for i in owners):
            while waiting and owners.count(_FREE) >= min(joining, len(waiting)):
                slots = [b for b, i in enumerate(owners) if i == _FREE][:min(joining, len(waiting))]
                taken = [waiting.pop() for _ in slots]
                for b, i in zip(slots, taken, strict=True):
                    owners[b] = i
                filler = joining - len(slots)
                rows, cache = _admit(
                    model, adapter, frozen, rows, cache, *pad_rows([prompts[i] for i in taken], joining, bucket),
                    np.asarray(taken + [0] * filler, np.int32), np.asarray(slots + [len(owners)] * filler, np.int32),
                    eos_ids_E, sampling=sampling)
            active = [b for b, i in enumerate(owners) if i != _FREE]
            size = len(owners)
            if not waiting and len(active) <= size // 2:
                size = min(size, max(_SMALLEST, 1 << (len(active) - 1).bit_length()))
            needed = capacity([owners[b] for b in active] + waiting)
            if size < len(owners) or needed <= room // 2:
                kept = (active + [b for b, i in enumerate(owners) if i == _FREE])[:size]
                room = needed if needed <= room // 2 else room
                rows, cache = _keep(rows, cache, np.asarray(kept, np.int32), capacity=room)
                owners = [owners[b] for b in kept]
            rows, cache = _decode(stepwise, *trees, rows, cache, eos_ids_E, steps=steps, sampling=sampling)
            tokens_BxN, counts_B, ended_B, finite_B = jax.device_get(
                (rows.tokens, rows.counts, rows.ended, rows.finite))
            for b, i in enumerate(owners):
                if i == _FREE or not ended_B[b]:
                    continue
                if not finite_B[b]:
                    raise FloatingPointError(f"generate: prompt {i}: the model's logits are not finite after "
                                             f"{counts_B[b]} tokens: its weights or activations overflowed")
                answers[i], owners[b] = tokens_BxN[b, :counts_B[b]].copy(), _FREE
                generated += int(counts_B[b])
                bar.update()
            under_way = sum(int(counts_B[b]) for b, i in enumerate(owners) if i != _FREE)
            speed = (generated + under_way) / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{speed:.1f} tokens/s")
    return answers
