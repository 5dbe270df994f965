"""What a defense is: a gradient estimator, of the same shape as an Optax transformation."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.conventions import at_least_float32

Tree = Any
# loss_fn(adapter, frozen, batch, perturbations=None, key=None) -> (scalar loss, aux). Vaccine and T-Vaccine read
# aux["perturbations"], the tree added at the perturbation sites, for its shapes; its leaves are stacked [L, ...].
LossFn = Callable[..., tuple[jax.Array, Mapping[str, Any]]]
# reference_loss_fn(adapter, frozen, batch, reference, key=None) -> (scalar loss, scalar distance): the loss, and how
# far what the adapter computes is from what another adapter, the reference, computes; in that there is no dropout.
ReferenceLossFn = Callable[..., tuple[jax.Array, jax.Array]]

# The released programs divide by ‖gradient‖ + 1e-7.
NORM_EPSILON = 1e-7


class Defense(NamedTuple):
    """Two pure functions, and a third for a method that freezes something.

    What wraps a defense passes on what it does not change: `defense._replace(gradient=...)`.

    Attributes:
      init: (adapter) -> state, a pytree of arrays.
      gradient: (adapter, frozen, state, batches, key) -> (grads, state, metrics). batches maps "alignment", and where
        the method needs them "harmful" and others, to a batch; a defense of the fine-tuning stage reads "user". key is
        a PRNG key, or None for no dropout where nothing else is drawn; metrics are scalars and [L] arrays, "loss" the
        alignment loss, at the fine-tuning stage that of the batch that is trained on.
      trainable: (state, adapter) -> what trains in the step whose `gradient` returned this state: a tree prefix of the
        adapter with [L] bool leaves, or with leaves of a leaf's whole shape where single weights are frozen; or None if
        nothing is. Where it is false, gradients are zero and the training step leaves that layer of those leaves, or
        that weight, as it is. By default nothing is frozen; a state that has active_layers in it, at whatever depth,
        needs its own.
      counters: names of fields of the state, a NamedTuple, that only count steps. Where many seeds are trained at once
        they share these numbers, so that a branch on one stays a branch (under `jax.vmap`, both sides of a branch on
        numbers that may differ are computed). One that is not named costs time and nothing else.
    """

    init: Callable[[Tree], Tree]
    gradient: Callable[..., tuple[Tree, Tree, dict[str, jax.Array]]]
    trainable: Callable[[Tree, Tree], Tree | None] = lambda state, adapter: None
    counters: tuple[str, ...] = ()


def check_not_negative(method: str, **values: float) -> None:
    """Raises ValueError, in the method's name, unless all of these are finite and at least 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{method}: {name}: found {value}, expected a finite number >= 0")


def check_positive(method: str, **counts: int) -> None:
    """Raises ValueError, in the method's name, unless all of these are at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{method}: {name}: found {count}, expected at least 1")


def take_batch(batches: Mapping[str, Tree], name: str, method: str) -> Tree:
    """batches[name].

    Raises:
      KeyError: it isn't there; names the method, the batch and those found.
    """
    if name not in batches:
        raise KeyError(f"{method}: batches: found {sorted(batches)}, expected also {name!r}")
    return batches[name]


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` independent keys, or as many None (no dropout) for None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def loss_gradient(loss_fn: LossFn, adapter, *args, **kwargs) -> tuple[jax.Array, Tree]:
    """The loss of these arguments, and its gradient with respect to the adapter."""
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(adapter, *args, **kwargs)
    return loss, grads


@jax.custom_batching.custom_vmap
def _is_a_number(x):
    return x == x


@_is_a_number.def_vmap
def _is_any_a_number(axis_size, in_batched, x):
    del axis_size, in_batched
    return _is_a_number(x).any(), False  # one answer for all, or the branch were none


def after(done: Tree, fn: Callable[[], Tree]) -> Tree:
    """fn(), a pass through the model that starts when `done` is computed.

    XLA sets up what a pass keeps of every layer before it begins. Of passes that could begin together it does so at the
    program's start, and holds the memory of all of them at once; a branch is a program of its own. Where `done`'s first
    number is NaN, and with it all that comes of this step, so are the results.
    """
    def nothing():
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(fn))

    return jax.lax.cond(_is_a_number(jnp.ravel(jax.tree.leaves(done)[0])[0]), fn, nothing)


def squared_norm(tree: Tree, first_axis: int = 0) -> jax.Array:
    """Σ x² over all leaves and their axes from `first_axis` on (1 keeps the layer axis: [L]), in at least float32."""
    def leaf(x):
        x = x.astype(at_least_float32(x.dtype))
        return jnp.sum(x * x, axis=tuple(range(first_axis, x.ndim)))

    return sum(leaf(x) for x in jax.tree.leaves(tree))


def global_norm(tree: Tree) -> jax.Array:
    """‖tree‖: one 2-norm over all leaves, in at least float32; its derivative at 0 is 0, not NaN."""
    squared = squared_norm(tree)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def scale_tree(factor: jax.Array, tree: Tree) -> Tree:
    """factor · tree, in the leaves' own dtypes."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def mask_layers(masks: Tree | None, tree: Tree) -> Tree:
    """The tree with zeros where axis 0 of a leaf is a layer that its mask leaves out, or single weights are.

    masks: [L] bool for all leaves, or a prefix of the tree with such leaves or with bools of a leaf's shape; None
      leaves nothing out.
    """
    return select_layers(masks, tree, jax.tree.map(lambda x: jnp.zeros((), x.dtype), tree))


def select_layers(masks: Tree | None, tree: Tree, other: Tree) -> Tree:
    """The tree, with `other`'s values where `mask_layers` has zeros."""
    if masks is None:
        return tree
    return jax.tree.map(lambda mask, x, y: jnp.where(_along(mask, x.ndim), x, y),
                        jax.tree.broadcast(masks, tree), tree, other)


def _along(mask: jax.Array, ndim: int) -> jax.Array:
    """The mask with axes of 1 behind its own."""
    return mask.reshape(*mask.shape, *[1] * (ndim - mask.ndim))


def both_train(one: Tree, layers: jax.Array) -> Tree:
    """Masks that are true where those of the tree `one` are, in the layers of [L] bool."""
    return jax.tree.map(lambda mask: mask & _along(layers, mask.ndim), one)


def layers_of(masks: Tree | None) -> Tree | None:
    """The masks as [L] bool: whether anything of a layer trains."""
    return jax.tree.map(lambda mask: mask.any(axis=tuple(range(1, mask.ndim))), masks)
