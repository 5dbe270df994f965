"""Supervised fine-tuning: no defense, the baseline of all papers, and what a user does."""

from jaxvaccine.defenses.base import Defense, LossFn, loss_gradient, take_batch


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
        loss, grads = loss_gradient(loss_fn, adapter, frozen, rows, key=key)
        return grads, state, {"loss": loss}

    return Defense(init=lambda adapter: (), gradient=gradient)
