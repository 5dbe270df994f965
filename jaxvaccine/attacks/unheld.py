"""Against EWC, and whatever holds weights by how much alignment depends on them: training of what is not held."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses import Defense
from jaxvaccine.defenses.base import Tree, mask_layers


class UnheldState(NamedTuple):
    """Which weights train."""

    trains: Tree  # bools like the adapter
    base: Any  # the base's state


def least_held(fisher: Tree, share: float) -> Tree:
    """Bools like the tree: F_i ≤ the ⌈share · N⌉-th smallest of all its N weights.

    More than the share where several equal that one: they are held alike.
    """
    leaves = jax.tree.leaves(fisher)
    values = jnp.sort(jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]))
    # 0.1 of 30 weights is 3 of them, not 3.0000000000000004.
    threshold = values[math.ceil(round(share * values.size, 6)) - 1]
    return jax.tree.map(lambda f: f <= threshold, fisher)


def unheld(base: Defense, share: float = 0.5, fisher: Tree | None = None) -> Defense:
    """The base on those weights alone whose Fisher weights are least: where F_i > the share's quantile, w_i stays s_i.

    EWC (`defenses.ewc`) holds a weight by lam · F_i (w_i − s_i)². What stays adds exactly 0 to that, whatever lam; the
    whole penalty is at most lam · q · ‖w − s‖², q the quantile: small where many F_i are, 0 where they are 0. The
    optimizer leaves the others alone too, decay and momentum included (`Defense.trainable` has a bool for each weight).

    Args:
      base: any; norms and steps that it takes itself are of all weights.
      share: the part of the weights that trains, above 0 up to 1; more where weights are held alike (`least_held`).
      fisher: F, a tree like the adapter: `defenses.diagonal_fisher` on alignment data, where training starts. None is
        1 everywhere, by which all are held alike, and train.

    Returns:
      The base with state `UnheldState`, and among its metrics trained_share, the part of the weights that trains. It
      has no counters: branches of the base's state are computed on both sides where many seeds are a batch.

    Raises:
      ValueError: share is out of range; by init, F is no tree like the adapter.
    """
    if not 0 < share <= 1:
        raise ValueError(f"unheld: share: found {share}, expected more than 0 and at most 1")

    def init(adapter) -> UnheldState:
        weights = jax.tree.map(jnp.ones_like, adapter) if fisher is None else fisher
        if jax.tree.map(jnp.shape, weights) != jax.tree.map(jnp.shape, adapter):
            raise ValueError("unheld: fisher: found a tree of other shapes, expected one like the adapter")
        return UnheldState(least_held(weights, share), base.init(adapter))

    def trainable(state: UnheldState, adapter) -> Tree:
        own = base.trainable(state.base, adapter)
        return mask_layers(own, state.trains)

    def gradient(adapter, frozen, state: UnheldState, batches, key):
        grads, of_base, metrics = base.gradient(adapter, frozen, state.base, batches, key)
        state = UnheldState(state.trains, of_base)
        leaves = jax.tree.leaves(state.trains)
        share_of_all = sum(leaf.mean() * (leaf.size / sum(x.size for x in leaves)) for leaf in leaves)
        return mask_layers(trainable(state, adapter), grads), state, metrics | {"trained_share": share_of_all}

    return Defense(init, gradient, trainable)
