"""Against Vaccine and T-Vaccine: fine-tuning under their perturbation of activations, turned round."""

import math

from jaxvaccine.defenses import Defense
from jaxvaccine.defenses.base import LossFn, take_batch
from jaxvaccine.defenses.vaccine import perturbed_gradient


def counter_perturbation(loss_fn: LossFn, rho: float = 2.0) -> Defense:
    """∇_w ℓ with every layer's attention output a_l moved to a_l − e_l, e_l held constant:

        e_l = rho · ∇_{a_l} ℓ / (‖(∇_{a_1} ℓ, …, ∇_{a_L} ℓ)‖ + 1e-7)

    ℓ the loss on the user's batch; one norm over all layers, rows, positions and features.

    Why this sign. Vaccine (arXiv 2402.01109, eq. 5-6) trains on f at a + e, e along ∇_a f. To first order in rho, with
    n = ∇_a f / ‖∇_a f‖ held, ∇_w f(a + rho n) = ∇_w f + rho ∇_w(∇_a f) n = ∇_w (f + rho ‖∇_a f‖): that makes the loss
    flat in the activations, so that their drift changes no answer. The other sign, ∇_w (ℓ − rho ‖∇_a ℓ‖), makes it
    steep: where an answer and its refusal share the probability, their losses have opposite gradients at the
    activations, and the refusal's loss gets steep with the answer's. So a positive rho undoes what Vaccine trained. A
    negative one is Vaccine itself on the attacker's data: it makes the attacker's answers hold under drift, such as
    one back towards refusals. Both are attacks; which one does more is a question for measurement.

    Args:
      loss_fn: a loss whose aux has "perturbations" (`base.LossFn`).
      rho: norm of the whole perturbation, in the activations' units, of either sign; 0 gives plain fine-tuning.

    Returns:
      A stateless defense that needs the batch "user". Metrics: loss (at the moved activations),
      activation_gradient_norm.

    Raises:
      ValueError: rho is not finite.
    """
    if not math.isfinite(rho):
        raise ValueError(f"counter_perturbation: rho: found {rho}, expected a finite number")

    def gradient(adapter, frozen, state, batches, key):
        batch = take_batch(batches, "user", "counter_perturbation")
        grads, metrics = perturbed_gradient(loss_fn, -rho, "gradient", None, None, adapter, frozen, batch, key)
        return grads, state, metrics

    return Defense(init=lambda adapter: (), gradient=gradient)
