"""What `generate` runs on the device: pure jitted steps over rows, each an answer under way, and their cache.

Shapes in names: B rows decoded together, G prompts that join them, T padded prompt length, N max_new_tokens, P tokens
that all prompts begin with, E number of EOS ids.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.cache import Cache, Stacked
from jaxvaccine.evaluation.sampling import Sampling, choose
from jaxvaccine.llama import Llama, cache_type, extend_cache, token_logits, unroll_layers


class Rows(NamedTuple):
    """Answers under way, one per row."""

    prompt: jax.Array  # [B] int32: its number
    last: jax.Array  # [B] int32
    tokens: jax.Array  # [B, N] int32
    counts: jax.Array  # [B] int32: tokens before EOS
    ended: jax.Array  # [B] bool
    finite: jax.Array  # [B] bool


def _fresh_rows(prompt_B, ended_B, max_new_tokens: int) -> Rows:
    zeros_B = jnp.zeros_like(prompt_B)
    return Rows(prompt_B, zeros_B, jnp.zeros((len(prompt_B), max_new_tokens), jnp.int32), zeros_B, ended_B,
                jnp.ones_like(ended_B))


def _record(model: Llama, frozen, rows: Rows, hidden_BxD, eos_ids_E, sampling: Sampling) -> Rows:
    """One more token for every row, from its last hidden state."""
    token_B, sound_B = choose(token_logits(model, frozen, hidden_BxD), rows.prompt, rows.counts, sampling)
    finite_B = rows.finite & (sound_B | rows.ended)
    ended_B = rows.ended | ~finite_B | jnp.any(token_B[:, None] == eos_ids_E, axis=-1)
    tokens_BxN = rows.tokens.at[jnp.arange(len(token_B)), rows.counts].set(token_B, mode="drop")
    counts_B = rows.counts + ~ended_B
    return Rows(rows.prompt, token_B, tokens_BxN, counts_B, ended_B | (counts_B == tokens_BxN.shape[1]), finite_B)


@functools.partial(jax.jit, static_argnames="model")
def read_shared(model: Llama, adapter, frozen, input_ids_P) -> Stacked:
    """The cache of what all prompts begin with: read once, for one row."""
    input_ids_1xP = input_ids_P[None]
    _, new = extend_cache(model, adapter, frozen, input_ids_1xP, jnp.ones_like(input_ids_1xP))
    return Stacked.of(new, jnp.full(1, len(input_ids_P), jnp.int32))


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity", "max_new_tokens"))
def empty(model: Llama, *, batch: int, capacity: int, max_new_tokens: int) -> tuple[Rows, Cache]:
    """Rows that have all ended, and their cache, as `model` reads it."""
    rows = _fresh_rows(jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), max_new_tokens)
    return rows, cache_type(model).empty(model.config, batch, capacity, model.dtype)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("rows", "cache"))
def admit(model: Llama, adapter, frozen, shared: tuple[Stacked, ...], eos_ids_E, rows: Rows, cache: Cache,
          input_ids_GxT, lengths_G, prompts_G, slots_G, *, sampling: Sampling) -> tuple[Rows, Cache]:
    """Prompts take over the rows `slots`, each with its first token. Slots beyond the last row hold filler.

    What `shared` holds, if anything, comes before each prompt. `model`'s layers are stacked, whatever the cache's.
    """
    lengths_G = jnp.maximum(lengths_G, 1)
    mask_GxT = (jnp.arange(input_ids_GxT.shape[1]) < lengths_G[:, None]).astype(jnp.int32)
    hidden_GxTxD, new = extend_cache(model, adapter, frozen, input_ids_GxT, mask_GxT, shared)
    joining = _record(model, frozen, _fresh_rows(prompts_G, jnp.zeros(len(prompts_G), bool), rows.tokens.shape[1]),
                      hidden_GxTxD[jnp.arange(len(lengths_G)), lengths_G - 1], eos_ids_E, sampling)
    return (jax.tree.map(lambda old, new: old.at[slots_G].set(new, mode="drop"), rows, joining),
            cache.replace(slots_G, type(cache).of(new, lengths_G)))


@functools.partial(jax.jit, static_argnames=("model", "steps"), donate_argnames=("rows", "cache"))
def decode(model: Llama, adapter, frozen, shared: tuple[Cache, ...], eos_ids_E, rows: Rows, cache: Cache, *,
           steps: int, sampling: Sampling) -> tuple[Rows, Cache]:
    """Up to `steps` more tokens for every row; fewer when all have ended.

    The cache itself is only read until the end. What is new lies in a short one of its own, in the same slots for all
    rows: to write every token where it belongs would take about as long as all of attention.
    """
    kind, ones_B = type(cache), jnp.ones(len(rows.last), jnp.int32)

    def advance(state: tuple[jax.Array, Rows, Cache]):
        step, rows, recent = state
        hidden_Bx1xD, new = extend_cache(model, adapter, frozen, rows.last[:, None], ones_B[:, None],
                                         (*shared, cache, recent))
        return (step + 1, _record(model, frozen, rows, hidden_Bx1xD[:, 0], eos_ids_E, sampling),
                recent.append(kind.of(new, ones_B), at=step))

    start = jnp.zeros((), jnp.int32), rows, kind.empty(model.config, len(rows.last), steps, model.dtype)
    _, rows, recent = jax.lax.while_loop(lambda state: (state[0] < steps) & ~jnp.all(state[1].ended), advance, start)
    return rows, cache.append(recent)


@functools.partial(jax.jit, static_argnames="capacity")
def keep(rows: Rows, cache: Cache, slots_B, *, capacity: int) -> tuple[Rows, Cache]:
    """The rows `slots` alone, with room for `capacity` positions."""
    return jax.tree.map(lambda x: x[slots_B], rows), cache.keep(slots_B, capacity)


@functools.partial(jax.jit, static_argnames="model")
def unrolled(model: Llama, adapter, frozen, shared: tuple[Stacked, ...]):
    """The trees and caches as an unrolled model takes them."""
    return (adapter and unroll_layers(model, adapter), unroll_layers(model, frozen),
            tuple(part.unrolled() for part in shared))
