"""Losses of a large batch in the memory of a small one: gradient accumulation whose result is the large batch's.

A defense differentiates its loss with respect to the adapter, or to perturbations of the whole batch, and takes norms
of what comes. So it is the loss that is computed of a few rows at a time, and its derivatives are put together before
anybody reads them: norms, clipping and simulated steps are those of the large batch. Vaccine's two passes become two
sweeps over the rows; between them the perturbations of all rows are kept, [L, B, T, D] (T-Vaccine: of S layers).

The last microbatch is filled with rows of the one before, which count for nothing there: any size will do.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxvaccine.conventions import IGNORED, at_least_float32
from jaxvaccine.perturbations import SiteNorms, Slots

Tree = Any
Batch = Mapping[str, Any]


def supervised_count(batch: Batch) -> jax.Array:
    """How many positions of a batch have a target: position i predicts label i + 1."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def in_microbatches(mean_fn: Callable, size: int, adapter, frozen, batch: Batch, perturbations=None, key=None
                    ) -> jax.Array:
    """mean_fn(adapter, frozen, batch, perturbations, key), computed of `size` rows at a time.

    The gradient is computed beside the value, one microbatch after the other, and nothing is computed twice for it.
    Dropout is drawn for each of them: without it the result is the whole batch's to rounding.

    Args:
      mean_fn: the mean of something over the supervised positions of a batch, whose rows do not depend on each other.
      size: rows of a microbatch; 0, or no fewer than the batch has, computes the whole at once.
      adapter, frozen: of mean_fn; perturbations: with rows [·, B, ...], or `Slots` or `SiteNorms` of such, or None.
    """
    if not 0 < size < _rows(batch):
        return mean_fn(adapter, frozen, batch, perturbations, key)
    kind, values, of_layer = type(perturbations), perturbations, None
    if kind is Slots:
        values, of_layer = perturbations
    elif kind is SiteNorms:
        values = perturbations.squared
    return _mean(mean_fn, size, kind, (adapter, frozen, values), (batch, of_layer, key))


def means_in_microbatches(means_fn: Callable, counts_fn: Callable, size: int, adapter, frozen, batch: Batch, reference,
                          key=None) -> Tree:
    """means_fn(adapter, frozen, batch, reference, key), several means, computed of `size` rows at a time.

    Their values are computed a second time for the gradient.

    Args:
      means_fn: a tree of means, of a batch whose rows do not depend on each other.
      counts_fn: batch -> a tree like it: over how many positions each of them goes.
      size: as of `in_microbatches`.
    """
    if not 0 < size < _rows(batch):
        return means_fn(adapter, frozen, batch, reference, key)
    totals = counts_fn(batch)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(sums, i):
        part = _microbatch(batch, size, i)
        means = means_fn(adapter, frozen, part, reference, _key(key, i))
        return jax.tree.map(jnp.add, sums, jax.tree.map(_part_of_mean, means, counts_fn(part), totals)), None

    zeros = _zeros(jax.eval_shape(means_fn, adapter, frozen, batch, reference, key))
    return jax.lax.scan(add, zeros, _numbers(batch, size))[0]


def _rows(batch: Batch) -> int:
    return batch["input_ids"].shape[0]


def _numbers(batch: Batch, size: int) -> jax.Array:
    return jnp.arange(-(-_rows(batch) // size))


def _key(key, i):
    return None if key is None else jax.random.fold_in(key, i)


def _start(batch: Batch, size: int, i):
    return jnp.minimum(i * size, _rows(batch) - size)


def _microbatch(batch: Batch, size: int, i) -> Batch:
    """Rows of microbatch i; those that the one before has counted are there without labels and mask."""
    start = _start(batch, size, i)
    rows = {name: jax.lax.dynamic_slice_in_dim(x, start, size) for name, x in batch.items()}
    new = (start + jnp.arange(size) >= i * size)[:, None]
    return {**rows, "labels": jnp.where(new, rows["labels"], IGNORED),
            "attention_mask": jnp.where(new, rows["attention_mask"], 0)}


def _part_of_mean(mean, count, total):
    """What a part, the mean of `count` positions, adds to the mean of all of them."""
    return mean * (count / jnp.maximum(total, 1)).astype(mean.dtype)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _of_microbatch(mean_fn, size, kind, trees, rest, i) -> tuple[Callable, tuple]:
    """(what microbatch i adds to the mean, a function of the three trees; the three trees that it is given)."""
    (adapter, frozen, values), (batch, of_layer, key) = trees, rest
    part = _microbatch(batch, size, i)

    def fn(adapter, frozen, values):
        perturbations = Slots(values, of_layer) if kind is Slots else SiteNorms(values) if kind is SiteNorms else values
        mean = mean_fn(adapter, frozen, part, perturbations, _key(key, i))
        return _part_of_mean(mean, supervised_count(part), supervised_count(batch))

    if kind is not SiteNorms:  # which are of all rows
        values = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, _start(batch, size, i), size, axis=1), values)
    return fn, (adapter, frozen, values)


def _zero_mean(mean_fn, trees, rest) -> jax.Array:
    (adapter, frozen, _), (batch, _, key) = trees, rest
    return _zeros(jax.eval_shape(mean_fn, adapter, frozen, batch, None, key))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mean(mean_fn, size, kind, trees, rest):
    """The mean of rest = (batch, of_layer of `Slots`, key); kind: as what mean_fn takes the third of the trees."""
    def add(total, i):
        fn, of = _of_microbatch(mean_fn, size, kind, trees, rest, i)
        return total + fn(*of), None

    return jax.lax.scan(add, _zero_mean(mean_fn, trees, rest), _numbers(rest[0], size))[0]


def _mean_fwd(mean_fn, size, kind, trees, rest):
    # Gradients of what somebody differentiates with respect to, and of nothing else.
    chosen = tuple(n for n, tree in enumerate(trees) if any(leaf.perturbed for leaf in jax.tree.leaves(tree)))
    trees, rest = jax.tree.map(lambda leaf: leaf.value, (trees, rest))
    by_rows = [n == 2 and kind is not SiteNorms for n in chosen]

    def add(sums, i):
        fn, of = _of_microbatch(mean_fn, size, kind, trees, rest, i)
        # Where the exact Booster differentiates this again, one microbatch's activations are kept at a time.
        mean, grads = jax.checkpoint(jax.value_and_grad(fn, argnums=chosen), prevent_cse=False)(*of)
        start = _start(rest[0], size, i)
        return (sums[0] + mean, [
            jax.tree.map(functools.partial(_add_rows, start) if rows else jnp.add, total, new)
            for total, new, rows in zip(sums[1], grads, by_rows, strict=True)]), None

    zeros = [jax.tree.map(lambda x, rows=rows: jnp.zeros(x.shape, x.dtype if rows else at_least_float32(x.dtype)),
                          trees[n]) for n, rows in zip(chosen, by_rows, strict=True)]
    (mean, sums), _ = jax.lax.scan(add, (_zero_mean(mean_fn, trees, rest), zeros), _numbers(rest[0], size))
    grads = [jax.tree.map(lambda total, x: total.astype(x.dtype), of, trees[n])
             for n, of in zip(chosen, sums, strict=True)]
    return mean, tuple(grads[chosen.index(n)] if n in chosen else None for n in range(len(trees)))


def _add_rows(start, total, rows):
    """total [·, B, ...] with rows [·, size, ...] added, the first of them to row `start`."""
    found = jax.lax.dynamic_slice_in_dim(total, start, rows.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, found + rows, start, axis=1)


def _mean_bwd(mean_fn, size, kind, grads, cotangent):
    del mean_fn, size

    def scaled(tree, factor):
        return jax.tree.map(lambda grad: (factor * grad).astype(grad.dtype), tree)

    adapter, frozen, values = grads
    return (scaled(adapter, cotangent), scaled(frozen, cotangent),
            scaled(values, cotangent**2 if kind is SiteNorms else cotangent)), None


_mean.defvjp(_mean_fwd, _mean_bwd, symbolic_zeros=True)
