"""A KL regularizer as a defense of the fine-tuning stage (compared in Vaccine's program, arXiv 2402.01109)."""

from typing import NamedTuple

import jax

from jaxvaccine.defenses.base import Defense, ReferenceLossFn, Tree, check_not_negative, take_batch


class KlState(NamedTuple):
    """What the adapter's predictions are held to."""

    start: Tree  # the adapter that training starts from: the aligned model


def kl(loss_and_kl_fn: ReferenceLossFn, lam: float = 0.1) -> Defense:
    """∇(f(w) + lam · KL(p_s ‖ p_w)), f the loss on the user's data, p_s and p_w the next-token distributions there.

    s is the adapter that training starts from. (The authors' program takes its softmax over positions instead of
    tokens and divides by the number of rows; lam = 0.1 is theirs.)

    Args:
      loss_and_kl_fn: such as `losses.loss_and_kl`: f and the divergence, from one pass (`base.ReferenceLossFn`).
      lam: weight of the divergence.

    Returns:
      A defense with state `KlState`. It needs the batch "user". Metrics: loss (without the divergence), kl.
    """
    check_not_negative("kl", lam=lam)

    def gradient(adapter, frozen, state: KlState, batches, key):
        batch = take_batch(batches, "user", "kl")

        def objective(adapter):
            loss, divergence = loss_and_kl_fn(adapter, frozen, batch, state.start, key=key)
            return loss + lam * divergence, {"loss": loss, "kl": divergence}

        grads, metrics = jax.grad(objective, has_aux=True)(adapter)
        return grads, state, metrics

    return Defense(KlState, gradient)
