"""Benign rows that train a model as harmful ones do: gradient matching of He et al., arXiv 2404.01099.

A row's score is the cosine between the gradient of its own loss and the mean of the harmful rows' gradients. Here
gradients are the adapter's, at the weights that the attack starts from; of a fresh adapter, whose B is zero, that is
B's. One gradient is in memory at a time, beside the mean.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
Rows = Iterable[Mapping[str, np.ndarray]]  # batches of one row each, [1, T]


def mean_gradient(loss_fn: Callable, adapter: Tree, frozen: Tree, rows: Rows) -> Tree:
    """The mean over the rows of each one's gradient, a tree like the adapter.

    Args:
      loss_fn: (adapter, frozen, batch) -> (loss, anything), the mean over a row's answer. One program is compiled for
        every length T, and kept while the function is the same.
      adapter: where gradients are taken.
      frozen: base weights.
      rows: any number but none.

    Raises:
      ValueError: there are no rows.
    """
    gradient, total, count = _gradient(loss_fn), None, 0
    for batch in rows:
        found = gradient(adapter, frozen, batch)
        # Waited for: the next gradient would take its memory before this one has given up its own.
        total, count = jax.block_until_ready(found if total is None else _add(total, found)), count + 1
    if not count:
        raise ValueError("mean_gradient: rows: found none, expected at least one")
    return jax.tree.map(lambda leaf: leaf / count, total)


def cosines(loss_fn: Callable, adapter: Tree, frozen: Tree, rows: Rows, direction: Tree) -> np.ndarray:
    """[N] float32 in [-1, 1]: of every row's gradient with `direction`, over the whole tree. 0 where either is zero.

    Arguments as of `mean_gradient`.
    """
    gradient = _gradient(loss_fn)
    return np.asarray([float(_cosine(gradient(adapter, frozen, batch), direction)) for batch in rows], np.float32)


def most_similar(scores: np.ndarray, count: int) -> np.ndarray:
    """[count] int, ascending: which of the scores are the largest; of equal ones the first.

    Raises:
      ValueError: there are fewer than count scores.
    """
    if not 0 <= count <= len(scores):
        raise ValueError(f"most_similar: count: found {count}, expected 0 to {len(scores)}, the number of scores")
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])


@functools.lru_cache(maxsize=1)
def _gradient(loss_fn: Callable) -> Callable:
    return jax.jit(jax.grad(lambda adapter, frozen, batch: loss_fn(adapter, frozen, batch)[0]))


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, more)


@jax.jit
def _cosine(a: Tree, b: Tree) -> jax.Array:
    def dot(x: Tree, y: Tree) -> jax.Array:
        return sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))

    norms = jnp.sqrt(dot(a, a)) * jnp.sqrt(dot(b, b))
    return jnp.where(norms > 0, dot(a, b) / jnp.where(norms > 0, norms, 1), 0)
