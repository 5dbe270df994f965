"""Tiny models and batches that many tests share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parity import steps as parity
from experiments.parity.steps import dot
from jaxvaccine import llama
from jaxvaccine.llama_config import TARGETS, LoraConfig

CONFIG = parity.TINY
# Windows shorter than half of a batch's rows; caps near the sizes of scores and logits; heads that are not D / N wide.
FAMILIES = {name: dataclasses.replace(CONFIG, **changes) for name, changes in {
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 10},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {"model_type": "qwen2", "sliding_window": 5, "sliding_layers": (False, False, True, True)},
    "gemma2": {"model_type": "gemma2", "tie_word_embeddings": True, "head_dim": 12, "query_pre_attn_scalar": 20,
               "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 5,
               "sliding_layers": (True, False, True, False)},
}.items()}


def model(rank=4, alpha=8.0, targets=TARGETS, dropout=0.0, config=CONFIG, dtype=jnp.float32, remat="full"):
    return llama.Llama(config, LoraConfig(rank, alpha, dropout, targets), dtype=dtype, remat=remat)


def trees(model, seed=0):
    """(adapter, frozen), with a B that is not zero, so that every gradient is at work."""
    keys = jax.random.split(jax.random.key(seed), 3)
    frozen = llama.init_frozen(model, keys[0])
    # Larger weights than a real initialisation's, so that the layers differ visibly.
    frozen = jax.tree.map(lambda x: x * 8 if x.ndim == 3 else x, frozen)
    adapter = llama.init_adapter(model, keys[1])
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(keys[2], x.shape, x.dtype), adapter), frozen


def batch(seed=0, rows=3, length=16, vocab=97):
    """Right-padded rows of different lengths, their second halves supervised."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, rows)[:, None]
    position = np.arange(length)[None]
    ids = rng.integers(0, vocab, (rows, length))
    return {
        "input_ids": np.where(position < lengths, ids, 0).astype(np.int32),
        "labels": np.where((position >= lengths // 2) & (position < lengths), ids, -100).astype(np.int32),
        "attention_mask": (position < lengths).astype(np.int32),
    }


def relative_difference(found, expected):
    """‖found − expected‖ / ‖expected‖ over whole trees."""
    return parity.distance(found, expected) / dot(expected, expected) ** 0.5


def direction(trees, seed=0):
    """A random direction of norm 1."""
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda x: rng.normal(size=x.shape), trees)
    return jax.tree.map(lambda x: x / dot(drawn, drawn) ** 0.5, drawn)


def slope(fn, trees, direction, step):
    """d/dt fn(*(trees + t · direction)) at 0 by central differences of fourth order."""
    def at(t):
        return float(fn(*jax.tree.map(lambda x, d: x + t * d, trees, direction)))

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
