"""Elastic weight consolidation as a defense of the fine-tuning stage (arXiv 1612.00796; compared in 2402.01109)."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import Defense, LossFn, Tree, check_not_negative, loss_gradient, take_batch


class EwcState(NamedTuple):
    """What the adapter is held to. Both trees are like it."""

    start: Tree
    fisher: Tree  # weights of the squared distances


def diagonal_fisher(loss_fn: LossFn, adapter, frozen, batches: Iterable[Tree]) -> Tree:
    """Σ over batches of (∇f)², elementwise, f the mean loss of a batch: a tree like the adapter.

    The sum of the authors' program; the Fisher information's diagonal is the mean of squared gradients of single
    examples. It grows with the number of batches. No dropout.

    Raises:
      ValueError: there is no batch.
    """
    @jax.jit
    def squared(total, adapter, frozen, batch):
        grads = jax.grad(lambda adapter: loss_fn(adapter, frozen, batch)[0])(adapter)
        return jax.tree.map(lambda t, g: t + g * g, total, grads)

    fisher, count = jax.tree.map(jnp.zeros_like, adapter), 0
    for batch in batches:
        fisher, count = squared(fisher, adapter, frozen, batch), count + 1
    if not count:
        raise ValueError("diagonal_fisher: batches: found none, expected at least one")
    return fisher


def ewc(loss_fn: LossFn, lam: float = 1e9, fisher: Tree | None = None) -> Defense:
    """∇(f(w) + lam · Σ_i F_i (w_i − s_i)²), f the loss on the user's data, s the adapter that training starts from.

    As in the authors' comparisons there is no factor of 1/2, and F is `diagonal_fisher` on alignment data at s.

    Args:
      loss_fn: any loss (`base.LossFn`).
      lam: weight of the penalty; theirs is 1e9, of Fisher weights that are squares of small gradients.
      fisher: F, a tree like the adapter; None is 1 everywhere, a plain proximal term.

    Returns:
      A defense with state `EwcState`. It needs the batch "user". Metrics: loss (without the penalty), penalty.
    """
    check_not_negative("ewc", lam=lam)

    def init(adapter) -> EwcState:
        weights = jax.tree.map(jnp.ones_like, adapter) if fisher is None else fisher
        if jax.tree.map(jnp.shape, weights) != jax.tree.map(jnp.shape, adapter):
            raise ValueError("ewc: fisher: found a tree of other shapes, expected one like the adapter")
        return EwcState(adapter, weights)

    def gradient(adapter, frozen, state: EwcState, batches, key):
        batch = take_batch(batches, "user", "ewc")
        loss, grads = loss_gradient(loss_fn, adapter, frozen, batch, key=key)
        pull = jax.tree.map(lambda w, s, f: lam * f * (w - s), adapter, state.start, state.fisher)
        penalty = sum(jnp.vdot(p, w - s) for p, w, s in zip(
            *map(jax.tree.leaves, (pull, adapter, state.start)), strict=True))
        grads = jax.tree.map(lambda g, p: g + 2 * p, grads, pull)
        return grads, state, {"loss": loss, "penalty": penalty}

    return Defense(init, gradient)
