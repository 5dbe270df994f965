"""Refusal ablation (arXiv 2406.11717): the direction in which a model refuses, projected out of its weights.

At the last token of a prompt, the residual stream of harmful prompts and that of harmless ones have two means; r is
their difference, normalised (eq. 1). What writes to the residual stream, the embedding and every layer's o_proj and
down_proj, then writes nothing along it (eq. 5): W ← W − r rᵀ W, in our layout, with the output on the last axis,
W − (W r) rᵀ.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.conventions import at_least_float32
from jaxvaccine.llama import Llama, layer_activations
from jaxvaccine.llama_config import LlamaConfig

Tree = Any
PART = 0.8  # of the layers, from which directions are taken (the paper, section 2.3)
WRITERS = (("attention", "o_proj"), ("mlp", "down_proj"))


class Direction(NamedTuple):
    """A direction, and where it is from."""

    r: jax.Array  # [D], of norm 1, in at least float32
    layer: int  # before which the residual stream was read
    separations: np.ndarray  # [L], as of `separations`


def lacks(config: LlamaConfig) -> str | None:
    """Why the projection of a family's weights is not that of what they add to the residual stream; None if it is."""
    if config.family.post_norms:
        return f"a norm between o_proj, down_proj and the residual stream ({config.model_type})"
    return None


def candidates(num_layers: int) -> range:
    """Layers whose direction is looked at: the first 80%, but not the first, which reads embeddings of one token."""
    return range(1, max(2, math.ceil(PART * num_layers)))


@functools.partial(jax.jit, static_argnums=0)
def _last_states(model: Llama, adapter, frozen, ids, mask):
    inputs = layer_activations(model, adapter, frozen, ids, mask).inputs
    last = mask.sum(axis=-1) - 1
    return jnp.take_along_axis(inputs, last[None, :, None, None], axis=2)[:, :, 0].astype(at_least_float32(model.dtype))


def last_states(model: Llama, adapter, frozen, prompts: Sequence[np.ndarray], *, rows: int = 32) -> np.ndarray:
    """[L, N, D]: what every layer reads of the residual stream at each prompt's last token, in at least float32.

    Args:
      model: with the adapter's LoRA sites.
      adapter: LoRA tree or None.
      frozen: base weights.
      prompts: N token ids, int32 [t].
      rows: prompts that are read together.
    """
    length = max(len(ids) for ids in prompts)
    found = []
    for start in range(0, len(prompts), rows):
        part = prompts[start:start + rows]
        ids, mask = (np.zeros((rows, length), np.int32) for _ in range(2))
        for i in range(rows):  # the last batch is filled up, so that there is one shape
            of = part[min(i, len(part) - 1)]
            ids[i, :len(of)], mask[i, :len(of)] = of, 1
        found.append(np.asarray(_last_states(model, adapter, frozen, ids, mask))[:, :len(part)])
    return np.concatenate(found, axis=1)


def mean_difference(harmful: np.ndarray, harmless: np.ndarray) -> np.ndarray:
    """[L, D] of [L, N, D] and [L, M, D]: the means' difference at every layer."""
    return harmful.mean(axis=1, dtype=np.float64) - harmless.mean(axis=1, dtype=np.float64)


def separations(harmful: np.ndarray, harmless: np.ndarray) -> np.ndarray:
    """[L]: how far apart the two sets are along their means' difference, in standard deviations.

    The projections' means apart over the root of the mean of their variances (d'), each half of the prompts, those of
    even and of odd numbers, along the direction of the other half, and the mean of both: on the prompts that it is of,
    a direction in many dimensions separates anything. 0 where there is no direction.
    """
    halves = [(harmful[:, i::2], harmless[:, i::2]) for i in (0, 1)]
    found = []
    for of, along in (halves, halves[::-1]):
        r = mean_difference(*along)
        a, b = (np.einsum("lnd,ld->ln", states.astype(np.float64), r) for states in of)
        apart, spread = a.mean(axis=1) - b.mean(axis=1), np.sqrt((a.var(axis=1) + b.var(axis=1)) / 2)
        found.append(np.divide(apart, spread, out=np.zeros_like(apart), where=spread > 0))
    return np.mean(found, axis=0)


def find_direction(harmful: np.ndarray, harmless: np.ndarray, layer: int | None = None) -> Direction:
    """The direction at a layer; by default at that of `candidates` where the two sets are furthest apart.

    The paper tries every direction on held-out prompts, and takes the one without which the model refuses least; this
    costs no generation, and knows nothing of refusals.

    Args:
      harmful, harmless: of `last_states`, at least two prompts each, if the layer is to be found.
      layer: before which the residual stream is read.

    Raises:
      ValueError: too few prompts; or the means are the same, as before the first layer, where every prompt ends with
        the same token.
    """
    if layer is None and min(harmful.shape[1], harmless.shape[1]) < 2:
        raise ValueError(f"find_direction: found {harmful.shape[1]} harmful and {harmless.shape[1]} harmless prompts, "
                         "expected at least 2 of each to choose a layer by")
    apart = separations(harmful, harmless) if min(harmful.shape[1], harmless.shape[1]) > 1 else np.zeros(len(harmful))
    if layer is None:
        among = [i for i in candidates(len(harmful)) if i < len(harmful)]
        layer = max(among, key=lambda i: apart[i], default=0)
    r = mean_difference(harmful, harmless)[layer]
    norm = np.linalg.norm(r)
    if not norm > 0:
        raise ValueError(f"find_direction: layer: found {layer}, where harmful and harmless prompts have one mean, "
                         "expected another")
    return Direction(jnp.asarray(r / norm, at_least_float32(harmful.dtype)), layer, apart)


def project_out(x, r):
    """x − (x r) rᵀ of x [..., D], computed in at least float32, in x's dtype."""
    wide = x.astype(at_least_float32(x.dtype))
    along = jnp.matmul(wide, r, precision=jax.lax.Precision.HIGHEST)
    return (wide - along[..., None] * r).astype(x.dtype)


def untied(model: Llama) -> Llama:
    """The model with an output head of its own."""
    return model.clone(config=dataclasses.replace(model.config, tie_word_embeddings=False))


def ablate(model: Llama, frozen: Tree, r) -> Tree:
    """The weights of `untied(model)` that write nothing along r to the residual stream, but for rounding.

    What reads it stays as it is, and with it the output head: where it is tied to the embedding, the result has the
    embedding as it was for a head. So the ablated model computes what the model would with r projected out of the
    residual stream wherever it is written. (The authors' program changes a tied embedding in place, and the head too.)

    Raises:
      ValueError: of a family as of `lacks`.
    """
    if lacking := lacks(model.config):
        raise ValueError(f"ablate: model: found {lacking}, expected none")
    layers = {name: dict(child) for name, child in frozen["layers"].items()}
    for block, name in WRITERS:
        of = layers[block][name]
        layers[block][name] = {**of, "kernel": project_out(of["kernel"], r)}
    head = {"lm_head": frozen["embed_tokens"].T} if model.config.tie_word_embeddings else {}
    return {**frozen, **head, "embed_tokens": project_out(frozen["embed_tokens"], r), "layers": layers}
