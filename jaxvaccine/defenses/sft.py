"""Supervised fine-tuning: no defense, the baseline of all papers, and what a user does."""

import jax

from jaxvaccine.defenses.base import Defense, LossFn, take_batch


def sft(loss_fn: LossFn, batch: str = "alignment") -> Defense:
    """∇f(w), f the loss on one batch.

    Args:
      loss_fn: any loss (`base.LossFn`).
      batch: the name of that batch: "alignment", or "user" where a user fine-tunes.

    Returns:
      A stateless defense. Metrics: loss.
    """

    def gradient(adapter, frozen, state, batches, key):
        rows = take_batch(batches, batch, "sft")
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(adapter, frozen, rows, key=key)
        return grads, state, {"loss": loss}

    return Defense(init=lambda adapter: (), gradient=gradient)
