"""Lisa: lazy safety alignment, a defense of the fine-tuning stage (arXiv 2405.18641)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import (
    Defense,
    LossFn,
    Tree,
    check_not_negative,
    check_positive,
    loss_gradient,
    squared_norm,
    take_batch,
)


class LisaState(NamedTuple):
    """Where the alternation stands."""

    step: jax.Array  # int32, gradients computed so far
    other: Tree  # the adapter at the last switch, the last point of the other phase; at first the start


def lisa(
    loss_fn: LossFn, alignment_steps: int = 100, user_steps: int = 900, rho: float = 1.0, start: float = 0.0,
) -> Defense:
    """K1 steps on alignment data, K2 on the user's, and so on, each phase held near the last point w' of the other:

        ∇(f(w) + rho/2 · ‖w − w'‖²) = ∇f(w) + rho · (w − w')

    (Lisa, Algorithm 1). f is the loss on the phase's batch; the first phase is on alignment data. w' is taken anew at
    every switch, so that a phase starts at distance 0. As in the authors' program, the phases alternate from the first
    step on and only the proximal term waits: the program adds it in the steps numbered above a tenth of all.
    The schedule is traced: a switch never recompiles.

    Args:
      loss_fn: any loss (`base.LossFn`).
      alignment_steps: K1, of a phase on alignment data.
      user_steps: K2, of a phase on the user's data.
      rho: weight of the proximal term.
      start: the proximal term acts in the steps whose number, from 0, is above this.

    Returns:
      A defense with state `LisaState`. It needs the batches "alignment" and "user", of the same shapes: a step
      computes one of them. Metrics: loss (of the batch that is trained on, without the proximal term), aligning (bool,
      whether that is the alignment's), switch_distance ‖w − w'‖.

    Raises:
      ValueError: an argument is out of range; by gradient, if the batches have other shapes.
    """
    check_positive("lisa", alignment_steps=alignment_steps, user_steps=user_steps)
    check_not_negative("lisa", rho=rho, start=start)

    def init(adapter) -> LisaState:
        return LisaState(jnp.zeros((), jnp.int32), adapter)

    def gradient(adapter, frozen, state: LisaState, batches, key):
        alignment, user = (take_batch(batches, name, "lisa") for name in ("alignment", "user"))
        if jax.tree.map(jnp.shape, alignment) != jax.tree.map(jnp.shape, user):
            raise ValueError(f"lisa: batches: found shapes {jax.tree.map(jnp.shape, user)} in 'user', expected "
                             f"{jax.tree.map(jnp.shape, alignment)} as in 'alignment'")
        position = state.step % (alignment_steps + user_steps)
        aligning = position < alignment_steps
        switching = (position == 0) | (position == alignment_steps)
        other = jax.tree.map(lambda w, old: jnp.where(switching, w, old), adapter, state.other)
        batch = jax.tree.map(lambda a, u: jnp.where(aligning, a, u), alignment, user)
        loss, grads = loss_gradient(loss_fn, adapter, frozen, batch, key=key)
        weight = jnp.where(state.step > start, rho, 0.0)
        apart = jax.tree.map(jnp.subtract, adapter, other)
        grads = jax.tree.map(lambda g, d: g + (weight * d).astype(g.dtype), grads, apart)
        metrics = {"loss": loss, "aligning": aligning, "switch_distance": jnp.sqrt(squared_norm(apart))}
        return grads, LisaState(state.step + 1, other), metrics

    return Defense(init, gradient, counters=("step",))
