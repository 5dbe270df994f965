"""Perturbations of some layers, and norms of all of them, without the memory of perturbations of all layers.

A loss adds perturbations at its sites, one or more in every layer: a tree with leaves [L, ...]. T-Vaccine needs less:
it perturbs S layers, and its probe reads nothing but norms. `Slots` and `SiteNorms` stand in the tree's place and say
just that. A loss whose aux has "slots" takes them (`add` is what it does at a site); any other one gets the tree that
means the same (`taking_slots`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.conventions import at_least_float32

Tree = Any


class Slots(NamedTuple):
    """Perturbations of S layers."""

    values: Tree  # leaves [S, ...]: what is added
    of_layer: jax.Array  # [L] int32: whose layer's site adds which of them; S adds nothing


class SiteNorms(NamedTuple):
    """Adds nothing. The loss's derivative with respect to it is every site's squared gradient norm."""

    squared: Tree  # leaves [L], at least float32: any numbers; their gradients are Σ (∂loss/∂a_l)²


def in_slots(active_layers: jax.Array, values: Tree) -> Slots:
    """Values [S, ...] for the S layers that are true in active_layers [L], from the lowest to the highest."""
    count = jax.tree.leaves(values)[0].shape[0]
    return Slots(values, jnp.where(active_layers, jnp.cumsum(active_layers, dtype=jnp.int32) - 1, count))


def collections(perturbations: Tree | Slots | SiteNorms | None) -> dict[str, Tree]:
    """What a model is given for its layers' sites: "perturbations", by layer, and "slots", for all layers."""
    if perturbations is None:
        return {}
    if isinstance(perturbations, Slots):
        numbers = jax.tree.map(lambda _: perturbations.of_layer, perturbations.values)
        return {"perturbations": numbers, "slots": perturbations.values}
    return {"perturbations": perturbations.squared if isinstance(perturbations, SiteNorms) else perturbations}


def add(x: jax.Array, perturbation: jax.Array, slots: jax.Array | None = None) -> jax.Array:
    """A layer's x with its perturbation.

    Args:
      x: what the layer has at the site.
      perturbation: of the tree, like x; with slots the layer's number of `Slots.of_layer`; of `SiteNorms`, a scalar.
      slots: the site's leaf of `Slots.values`, [S, *x.shape].
    """
    if slots is not None:
        return x + slots.at[perturbation].get(mode="fill", fill_value=0)
    if jnp.ndim(perturbation) == 0:
        return _with_squared_norm(x, perturbation)
    return x + perturbation


@jax.custom_vjp
def _with_squared_norm(x, squared):
    """x; the derivative with respect to squared is the squared norm of that with respect to x."""
    del squared
    return x


def _squared_norm_bwd(_, grad):
    in_full = grad.astype(at_least_float32(grad.dtype))
    return grad, jnp.sum(in_full * in_full)


_with_squared_norm.defvjp(lambda x, squared: (x, None), _squared_norm_bwd)


def taking_slots(loss_fn: Callable) -> Callable:
    """loss_fn, which takes `Slots` and `SiteNorms` in any case: where it cannot, as the tree that means the same."""
    def call(adapter, frozen, batch, perturbations=None, key=None):
        if isinstance(perturbations, Slots | SiteNorms):
            _, aux = jax.eval_shape(loss_fn, adapter, frozen, batch, None, key)
            if "slots" not in aux:
                perturbations = _of_all_layers(perturbations, aux["perturbations"])
        return loss_fn(adapter, frozen, batch, perturbations, key)

    return call


def _of_all_layers(perturbations: Slots | SiteNorms, shapes: Tree) -> Tree:
    if isinstance(perturbations, Slots):
        return jax.tree.map(
            lambda slots: slots.at[perturbations.of_layer].get(mode="fill", fill_value=0), perturbations.values)
    return jax.tree.map(
        lambda of, squared: jax.vmap(_with_squared_norm)(jnp.zeros(of.shape, of.dtype), squared),
        shapes, perturbations.squared)
