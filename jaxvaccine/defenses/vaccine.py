"""Vaccine: perturbation-aware alignment (arXiv 2402.01109)."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import (
    NORM_EPSILON,
    Defense,
    LossFn,
    Tree,
    check_not_negative,
    global_norm,
    mask_layers,
    scale_tree,
    split_key,
    take_batch,
)

Direction = Literal["gradient", "gaussian"]


def check_perturbation(method: str, rho: float, direction: str) -> None:
    """Raises ValueError, in the method's name, unless these describe a perturbation."""
    check_not_negative(method, rho=rho)
    if direction not in ("gradient", "gaussian"):
        raise ValueError(f"{method}: direction: found {direction!r}, expected gradient or gaussian")


def zero_sites(loss_fn: LossFn, adapter, frozen, batch, key) -> Tree:
    """Zeros at every perturbation site, leaves [L, B, T, D] for a language model.

    Raises:
      ValueError: aux of loss_fn has no "perturbations", so there is no site to perturb.
    """
    _, aux = jax.eval_shape(loss_fn, adapter, frozen, batch, None, key)
    if not isinstance(aux, Mapping) or "perturbations" not in aux:
        raise ValueError("loss_fn: aux has no 'perturbations', expected the tree added at the perturbation sites")
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), aux["perturbations"])


def activation_gradient(loss_fn: LossFn, adapter, frozen, batch, key) -> tuple[jax.Array, Tree]:
    """The loss and its gradient with respect to every perturbation site, leaves [L, B, T, D] for a language model.

    Only activations are differentiated: no weight gradient is computed.
    """
    zeros = zero_sites(loss_fn, adapter, frozen, batch, key)
    (loss, _), grads = jax.value_and_grad(loss_fn, argnums=3, has_aux=True)(adapter, frozen, batch, zeros, key)
    return loss, grads


def gaussian_sites(loss_fn: LossFn, adapter, frozen, batch, key) -> Tree:
    """Independent standard normal numbers at every perturbation site, at padding too."""
    leaves, treedef = jax.tree.flatten(zero_sites(loss_fn, adapter, frozen, batch, key))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [
        jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)])


def perturbed_gradient(loss_fn: LossFn, rho: float, direction: Direction, active_layers, trainable, adapter, frozen,
                       batch, key):
    """Vaccine's gradient: (grads, metrics).

    active_layers: [L] bool, which layers are perturbed; None: all.
    trainable: which gradients are kept (`base.mask_layers`).
    """
    if direction == "gaussian" and key is None:
        raise ValueError("direction='gaussian': key: found None, expected a PRNG key to draw the perturbation with")
    first_key, second_key = split_key(key, 2)
    if direction == "gaussian":
        sites = gaussian_sites(loss_fn, adapter, frozen, batch, first_key)
    else:
        _, sites = activation_gradient(loss_fn, adapter, frozen, batch, first_key)
    sites = mask_layers(active_layers, sites)
    norm = global_norm(sites)
    perturbations = jax.lax.stop_gradient(scale_tree(rho / (norm + NORM_EPSILON), sites))
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(adapter, frozen, batch, perturbations, second_key)
    metrics = {"activation_gradient_norm": norm} if direction == "gradient" else {}
    return mask_layers(trainable, grads), {"loss": loss, **metrics}


def vaccine(loss_fn: LossFn, rho: float = 2.0, direction: Direction = "gradient") -> Defense:
    """∇_w f with every layer's attention output a_l moved to a_l + e_l, e_l held constant (Vaccine, eq. 5-6):

        e_l = rho · ∇_{a_l} f / (‖(∇_{a_1} f, …, ∇_{a_L} f)‖ + 1e-7)

    one 2-norm over all layers, rows, positions and features, f the mean loss of the batch. The first pass
    differentiates activations only.

    Args:
      loss_fn: a loss whose aux has "perturbations" (`base.LossFn`).
      rho: norm of the whole perturbation, in the activations' units; 0 gives SFT.
      direction: "gradient", or "gaussian" for an ablation (Random Vaccine): Gaussian noise in the place of ∇_{a_l} f,
        scaled to the same norm, so that nothing but the direction differs; needs a key. (The released program's noise
        has a variance of rho in every element instead: a norm that grows with the batch.)

    Returns:
      A stateless defense that needs the batch "alignment". Metrics: loss (at the perturbed activations, as the released
      program reports it), and with "gradient" activation_gradient_norm.

    Raises:
      ValueError: an argument is out of range.
    """
    check_perturbation("vaccine", rho, direction)

    def gradient(adapter, frozen, state, batches, key):
        batch = take_batch(batches, "alignment", "vaccine")
        grads, metrics = perturbed_gradient(loss_fn, rho, direction, None, None, adapter, frozen, batch, key)
        return grads, state, metrics

    return Defense(init=lambda adapter: (), gradient=gradient)
