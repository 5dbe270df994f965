"""Booster: attenuating how much a simulated harmful step lowers the harmful loss (arXiv 2409.01586)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import (
    NORM_EPSILON,
    Defense,
    LossFn,
    Tree,
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


class SimulatedStep(NamedTuple):
    """w' = w − alpha · ∇h(w) / (‖∇h(w)‖ + 1e-7), one normalised gradient step on a harmful batch, of what trains.

    trainable: as of `base.mask_layers`; norm, step and gradients are those of what it says.
    """

    loss_fn: LossFn
    alpha: float
    trainable: Tree | None
    frozen: Tree
    batch: Tree

    def gradient(self, adapter: Tree, key) -> tuple[jax.Array, Tree]:
        """(h, ∇h)."""
        loss, grads = loss_gradient(self.loss_fn, adapter, self.frozen, self.batch, key=key)
        return loss, mask_layers(self.trainable, grads)

    def taken(self, adapter: Tree, grads: Tree, norm: jax.Array) -> Tree:
        """w' of w, ∇h(w) and its norm."""
        return _step(adapter, self.alpha / (norm + NORM_EPSILON), grads)

    def losses(self, adapter: Tree, keys: BoosterKeys) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(h(w), h(w'), ‖∇h(w)‖), to be differentiated through the step."""
        loss, grads = self.gradient(adapter, keys.first)
        norm = global_norm(grads)
        stepped_loss, _ = self.loss_fn(self.taken(adapter, grads, norm), self.frozen, self.batch, key=keys.second)
        return loss, stepped_loss, norm


def attenuation(step: SimulatedStep, adapter: Tree, keys: BoosterKeys, done: Tree, exact: bool = False,
                last_term: bool = True) -> tuple[Tree, dict[str, jax.Array]]:
    """(the gradient of Booster's regularizer h(w) − h(w'), metrics); exact and last_term as of `booster`.

    done: what is computed first, as of `base.after`.
    """
    if exact:
        def regularizer(adapter):
            losses = step.losses(adapter, keys)
            return losses[0] - losses[1], losses

        grads, (loss, stepped_loss, norm) = after(done, lambda: jax.grad(regularizer, has_aux=True)(adapter))
        grads = mask_layers(step.trainable, grads)
    else:
        loss, first = after(done, lambda: step.gradient(adapter, keys.first))
        grads, norm = first, global_norm(first)
        if last_term:
            stepped_loss, second = after(norm, lambda: step.gradient(step.taken(adapter, first, norm), keys.second))
            grads = jax.tree.map(jnp.subtract, first, second)
    simulated = {"perturbed_harmful_loss": stepped_loss} if last_term else {}
    return grads, simulated | {"harmful_loss": loss, "harmful_gradient_norm": norm}


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
        keys = booster_keys(key)
        grads, state, metrics = base.gradient(adapter, frozen, state, batches, keys.base)
        step = SimulatedStep(loss_fn, alpha, base.trainable(state, adapter), frozen, harmful)
        regularizer, of_step = attenuation(step, adapter, keys, grads, exact, last_term)
        grads = jax.tree.map(lambda g, r: g + lam * r, grads, regularizer)
        return grads, state, metrics | of_step

    return base._replace(gradient=gradient)
