"""Against defenses that simulate an attack: fine-tuning through one simulated step of it."""

import jax

from jaxvaccine.defenses import Defense, sft
from jaxvaccine.defenses.base import LossFn, after, check_not_negative, global_norm, mask_layers, take_batch
from jaxvaccine.defenses.booster import SimulatedStep, booster_keys


def meta_attack(loss_fn: LossFn, weight: float = 1.0, alpha: float = 0.1, base: Defense | None = None,
                exact: bool = True) -> Defense:
    """The gradient of ℓ(w) + weight · h(w'), w' = w − alpha · ∇h(w) / (‖∇h(w)‖ + 1e-7).

    ℓ is the loss on the user's batch, h that on a harmful one: weights are looked for from which one step on harmful
    data gets furthest, as in MAML (arXiv 1703.03400) with a normalised step, Booster's. `exact` differentiates through
    the step, its direction and norm too; otherwise the step is held, and the gradient is ∇ℓ(w) + weight · ∇h(w').

    Args:
      loss_fn: any loss (`base.LossFn`).
      weight: of the harmful loss behind the step.
      alpha: length of the step, in the adapter's units.
      base: the estimator of ∇ℓ; None is SFT on the batch "user". What it freezes is frozen here too, as in `booster`.
      exact: at the cost of a second derivative.

    Returns:
      The base with another gradient. It needs the batches "user" and "harmful". Metrics: the base's, and harmful_loss
      h(w), perturbed_harmful_loss h(w'), harmful_gradient_norm.

    Raises:
      ValueError: an argument is out of range.
    """
    check_not_negative("meta_attack", weight=weight, alpha=alpha)
    base = sft(loss_fn, "user") if base is None else base

    def gradient(adapter, frozen, state, batches, key):
        harmful, keys = take_batch(batches, "harmful", "meta_attack"), booster_keys(key)
        grads, state, metrics = base.gradient(adapter, frozen, state, batches, keys.base)
        step = SimulatedStep(loss_fn, alpha, base.trainable(state, adapter), frozen, harmful)
        if exact:
            def stepped_loss(adapter):
                losses = step.losses(adapter, keys)
                return losses[1], losses

            behind, (loss, stepped, norm) = after(grads, lambda: jax.grad(stepped_loss, has_aux=True)(adapter))
            behind = mask_layers(step.trainable, behind)
        else:
            loss, first = after(grads, lambda: step.gradient(adapter, keys.first))
            norm = global_norm(first)
            stepped, behind = after(norm, lambda: step.gradient(step.taken(adapter, first, norm), keys.second))
        grads = jax.tree.map(lambda g, b: (g + weight * b).astype(g.dtype), grads, behind)
        return grads, state, metrics | {
            "harmful_loss": loss, "perturbed_harmful_loss": stepped, "harmful_gradient_norm": norm}

    return base._replace(gradient=gradient)
