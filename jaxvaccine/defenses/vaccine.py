"""Vaccine: perturbation-aware alignment (arXiv 2402.01109)."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import (
    NORM_EPSILON,
    Defense,
    LossFn,
    Tree,
    after,
    at_least_float32,
    check_not_negative,
    global_norm,
    loss_gradient,
    mask_layers,
    scale_tree,
    split_key,
    take_batch,
)
from jaxvaccine.perturbations import SiteNorms, Slots, in_slots

Direction = Literal["gradient", "gaussian"]


class ActiveLayers(NamedTuple):
    """The layers that are perturbed, where not all of them are. Their loss is of `taking_slots`."""

    mask: jax.Array  # [L] bool, exactly `count` true
    count: int


def place(at: ActiveLayers | None, values: Tree) -> Tree | Slots:
    """Perturbations of all layers, or of those that are active."""
    return values if at is None else in_slots(at.mask, values)


def check_perturbation(method: str, rho: float, direction: str) -> None:
    """Raises ValueError, in the method's name, unless these describe a perturbation."""
    check_not_negative(method, rho=rho)
    if direction not in ("gradient", "gaussian"):
        raise ValueError(f"{method}: direction: found {direction!r}, expected gradient or gaussian")


def site_shapes(loss_fn: LossFn, adapter, frozen, batch, key) -> Tree:
    """ShapeDtypeStructs of the perturbation sites, leaves [L, B, T, D] for a language model.

    Raises:
      ValueError: aux of loss_fn has no "perturbations", so there is no site to perturb.
    """
    _, aux = jax.eval_shape(loss_fn, adapter, frozen, batch, None, key)
    if not isinstance(aux, Mapping) or "perturbations" not in aux:
        raise ValueError("loss_fn: aux has no 'perturbations', expected the tree added at the perturbation sites")
    return aux["perturbations"]


def zero_sites(loss_fn: LossFn, adapter, frozen, batch, key, layers: int | None = None) -> Tree:
    """Zeros at every perturbation site, or at those of so many layers."""
    return jax.tree.map(lambda x: jnp.zeros((layers or x.shape[0], *x.shape[1:]), x.dtype),
                        site_shapes(loss_fn, adapter, frozen, batch, key))


def activation_gradient(loss_fn: LossFn, adapter, frozen, batch, key, at: ActiveLayers | None = None
                        ) -> tuple[jax.Array, Tree]:
    """The loss and its gradient with respect to every perturbation site, leaves [L, B, T, D] for a language model.

    Only activations are differentiated: no weight gradient is computed. With `at`, of its layers alone: [S, B, T, D].
    """
    zeros = zero_sites(loss_fn, adapter, frozen, batch, key, at and at.count)
    (loss, _), grads = jax.value_and_grad(
        lambda values: loss_fn(adapter, frozen, batch, place(at, values), key), has_aux=True)(zeros)
    return loss, grads


def site_norms(loss_fn: LossFn, adapter, frozen, batch, key) -> jax.Array:
    """‖∇_{a_l} loss‖ of every layer, [L], at least float32: what `activation_gradient` has the norms of, and no more.

    loss_fn: of `taking_slots`.
    """
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[0], at_least_float32(x.dtype)),
                         site_shapes(loss_fn, adapter, frozen, batch, key))
    grads = jax.grad(lambda squared: loss_fn(adapter, frozen, batch, SiteNorms(squared), key)[0])(zeros)
    return jnp.sqrt(sum(jax.tree.leaves(grads)))


def gaussian_sites(loss_fn: LossFn, adapter, frozen, batch, key, at: ActiveLayers | None = None) -> Tree:
    """Independent standard normal numbers at every perturbation site, at padding too; with `at`, of its layers."""
    leaves, treedef = jax.tree.flatten(zero_sites(loss_fn, adapter, frozen, batch, key, at and at.count))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [
        jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)])


def perturbed_gradient(loss_fn: LossFn, rho: float, direction: Direction, at: ActiveLayers | None, trainable, adapter,
                       frozen, batch, key):
    """Vaccine's gradient: (grads, metrics).

    at: which layers are perturbed; None: all.
    trainable: which gradients are kept (`base.mask_layers`).
    """
    if direction == "gaussian" and key is None:
        raise ValueError("direction='gaussian': key: found None, expected a PRNG key to draw the perturbation with")
    first_key, second_key = split_key(key, 2)
    if direction == "gaussian":
        sites = gaussian_sites(loss_fn, adapter, frozen, batch, first_key, at)
    else:
        _, sites = activation_gradient(loss_fn, adapter, frozen, batch, first_key, at)
    norm = global_norm(sites)
    perturbations = jax.lax.stop_gradient(scale_tree(rho / (norm + NORM_EPSILON), sites))
    loss, grads = after(norm, lambda: loss_gradient(
        loss_fn, adapter, frozen, batch, place(at, perturbations), second_key))
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
