"""Booster: attenuating how much a simulated harmful step lowers the harmful loss (arXiv 2409.01586)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import (
    NORM_EPSILON,
    Defense,
    LossFn,
    after,
    check_not_negative,
    global_norm,
    loss_gradient,
    mask_layers,
    split_key,
    take_batch,
)
from jaxvaccine.defenses.sft import sft


class BoosterKeys(NamedTuple):
    """What a step's key is split into; None each without dropout."""

    base: jax.Array | None  # the base's
    first: jax.Array | None  # dropout of h(w)
    second: jax.Array | None  # dropout of h(w')


def booster_keys(key: jax.Array | None) -> BoosterKeys:
    return BoosterKeys(*split_key(key, 3))


def _step(adapter, factor, grads):
    return jax.tree.map(lambda w, g: w - (factor * g).astype(w.dtype), adapter, grads)


def booster(
    loss_fn: LossFn, lam: float = 5.0, alpha: float = 0.1, base: Defense | None = None, exact: bool = False,
    last_term: bool = True,
) -> Defense:
    """∇f(w) + lam · (∇h(w) − ∇h(w')), w' = w − alpha · ∇h(w) / (‖∇h(w)‖ + 1e-7) (Booster, Algorithm 1, eq. 3-4).

    The regularizer lam · (h(w) − h(w')) is how much one normalised gradient step on harmful data would lower the
    harmful loss h. The paper's gradient holds the step's direction constant; `exact` differentiates through it.

    Args:
      loss_fn: any loss (`base.LossFn`).
      lam: weight of the regularizer.
      alpha: length of the simulated step, in the adapter's units.
      base: the defense whose gradient stands in the place of ∇f, such as `vaccine(...)`; None is SFT. What it freezes
        is frozen here too: norm, simulated step and gradient are those of what it trains.
      exact: the true gradient of the regularizer, at the cost of a second derivative.
      last_term: False leaves ∇h(w') out, the paper's ablation: ∇f(w) + lam · ∇h(w) lowers the harmful loss itself, and
        nothing is simulated.

    Returns:
      The base with another gradient. It needs the batches "alignment" and "harmful". Metrics: the base's, and
      harmful_loss h(w), perturbed_harmful_loss h(w'), harmful_gradient_norm.

    Raises:
      ValueError: lam or alpha is negative; exact, of a gradient without its last term.
    """
    check_not_negative("booster", lam=lam, alpha=alpha)
    if exact and not last_term:
        raise ValueError("booster: exact: found True, expected False without the last term, which alone it changes")
    base = sft(loss_fn) if base is None else base

    def gradient(adapter, frozen, state, batches, key):
        harmful = take_batch(batches, "harmful", "booster")
        base_key, first_key, second_key = booster_keys(key)
        grads, state, metrics = base.gradient(adapter, frozen, state, batches, base_key)
        trainable = base.trainable(state, adapter)

        def harmful_gradient(adapter, key):
            loss, grads = loss_gradient(loss_fn, adapter, frozen, harmful, key=key)
            return loss, mask_layers(trainable, grads)

        def normalised(grads):
            norm = global_norm(grads)
            return norm, alpha / (norm + NORM_EPSILON)

        if exact:
            def regularizer(adapter):
                loss, grads = harmful_gradient(adapter, first_key)
                norm, factor = normalised(grads)
                perturbed_loss, _ = loss_fn(_step(adapter, factor, grads), frozen, harmful, key=second_key)
                return loss - perturbed_loss, (loss, perturbed_loss, norm)

            attenuation, (loss, perturbed_loss, norm) = after(
                grads, lambda: jax.grad(regularizer, has_aux=True)(adapter))
            attenuation = mask_layers(trainable, attenuation)
        else:
            loss, harmful_grads = after(grads, lambda: harmful_gradient(adapter, first_key))
            norm, factor = normalised(harmful_grads)
            attenuation = harmful_grads
            if last_term:
                perturbed_loss, perturbed_grads = after(
                    norm, lambda: harmful_gradient(_step(adapter, factor, harmful_grads), second_key))
                attenuation = jax.tree.map(jnp.subtract, harmful_grads, perturbed_grads)

        grads = jax.tree.map(lambda g, r: g + lam * r, grads, attenuation)
        simulated = {"perturbed_harmful_loss": perturbed_loss} if last_term else {}
        return grads, state, metrics | simulated | {"harmful_loss": loss, "harmful_gradient_norm": norm}

    return base._replace(gradient=gradient)
