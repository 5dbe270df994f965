"""Against Booster: its flatness is undone first, then comes plain fine-tuning."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses import Defense, sft
from jaxvaccine.defenses.base import LossFn, Tree, check_not_negative, check_positive, take_batch
from jaxvaccine.defenses.booster import SimulatedStep, attenuation, booster_keys


class SteepenState(NamedTuple):
    """Where the attack stands."""

    step: jax.Array  # int32, gradients computed so far
    reduction: jax.Array  # h(w) − h(w') when it was last computed; 0 before
    base: Tree  # the base's own


def steepen(loss_fn: LossFn, lam: float = 5.0, alpha: float = 0.1, steps: int = 100, base: Defense | None = None,
            exact: bool = False) -> Defense:
    """For the first `steps` steps the gradient of ℓ(w) − lam · (h(w) − h(w')), then that of ℓ(w) alone:

        ∇ℓ(w) − lam · (∇h(w) − ∇h(w')),  w' = w − alpha · ∇h(w) / (‖∇h(w)‖ + 1e-7)

    Booster's gradient (arXiv 2409.01586, eq. 3-4) with the other sign, ℓ the loss on the user's batch, h that on a
    harmful one. Booster keeps small by how much one step on harmful data lowers the harmful loss; here that grows, so
    that the steps afterwards get further. As in the paper, the step's direction is held constant; `exact`
    differentiates through it. Afterwards nothing of h is computed.

    Args:
      loss_fn: any loss (`base.LossFn`).
      lam: weight of the regularizer.
      alpha: length of the simulated step, in the adapter's units.
      steps: how long.
      base: the estimator of ∇ℓ; None is SFT on the batch "user". What it freezes is frozen here too, as in `booster`.
      exact: the true gradient of the regularizer, at the cost of a second derivative.

    Returns:
      A defense with state `SteepenState`. It needs the batches "user" and "harmful". Metrics: the base's, steepening
      (bool, whether this step does), and reduction h(w) − h(w'), afterwards as of the last step that computed it.

    Raises:
      ValueError: an argument is out of range.
    """
    check_not_negative("steepen", lam=lam, alpha=alpha)
    check_positive("steepen", steps=steps)
    base = sft(loss_fn, "user") if base is None else base

    def init(adapter) -> SteepenState:
        dtype = jnp.result_type(*jax.tree.leaves(adapter))
        return SteepenState(jnp.zeros((), jnp.int32), jnp.zeros((), dtype), base.init(adapter))

    def gradient(adapter, frozen, state: SteepenState, batches, key):
        harmful, keys = take_batch(batches, "harmful", "steepen"), booster_keys(key)
        grads, of_base, metrics = base.gradient(adapter, frozen, state.base, batches, keys.base)

        def steepened():
            step = SimulatedStep(loss_fn, alpha, base.trainable(of_base, adapter), frozen, harmful)
            regularizer, of_step = attenuation(step, adapter, keys, grads, exact)
            reduction = of_step["harmful_loss"] - of_step["perturbed_harmful_loss"]
            return (jax.tree.map(lambda g, r: (g - lam * r).astype(g.dtype), grads, regularizer),
                    reduction.astype(state.reduction.dtype))

        steepening = state.step < steps
        grads, reduction = jax.lax.cond(steepening, steepened, lambda: (grads, state.reduction))
        metrics = metrics | {"steepening": steepening, "reduction": reduction}
        return grads, SteepenState(state.step + 1, reduction, of_base), metrics

    def trainable(state: SteepenState, adapter):
        return base.trainable(state.base, adapter)

    return Defense(init, gradient, trainable, counters=("step",))
