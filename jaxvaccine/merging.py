"""An adapter that no longer trains: merged into the base's weights, or frozen beside those that can't take it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.llama import Llama
from jaxvaccine.quantisation import is_quantised


class Update(NamedTuple):
    """What is added to a kernel W, as A B, both in the type of the computation; the scale is in B."""

    a: jax.Array  # [..., in, r]
    b: jax.Array  # [..., r, out]


def merge_adapter(model: Llama, adapter, frozen):
    """Base weights with W + (alpha / rank) A B in the place of W, summed in the adapter's dtype, cast to the base's.

    Layer by layer: under `jax.jit` with `frozen` donated it takes no more than one layer's sum beside the weights.

    Raises:
      ValueError: the base is quantised. To quantise the sum anew would lose most of the adapter.
    """
    if is_quantised(frozen):
        raise ValueError("merge_adapter: found a quantised base, expected float weights; freeze_adapter is for others")

    def merged(kernel, a, b):
        return (kernel + model.lora.scale * jnp.matmul(a, b)).astype(kernel.dtype)

    def merge(base, lora):
        kernel, a, b = base["kernel"], lora["a"], lora["b"]
        return {**base, "kernel": jax.lax.fori_loop(
            0, kernel.shape[0], lambda i, kernel: kernel.at[i].set(merged(kernel[i], a[i], b[i])), kernel)}

    return _at_sites(merge, frozen, adapter)


def freeze_adapter(model: Llama, adapter, frozen):
    """The base with the adapter as an `Update` beside each kernel, quantised or not: y = x W + x A0 B0 + ….

    An update that is there already stays: the two are one, of both ranks together. Adapters of several lanes,
    [N, L, ...], give updates [N, L, ...].
    """
    def beside(base, lora):
        new = Update(lora["a"].astype(model.dtype), (model.lora.scale * lora["b"]).astype(model.dtype))
        if old := base.get("update"):
            new = Update(jnp.concatenate([old.a, new.a], axis=-1), jnp.concatenate([old.b, new.b], axis=-2))
        return {**base, "update": new}

    return _at_sites(beside, frozen, adapter)


def _at_sites(function, frozen, adapter):
    """The base with `function(projection, its adapter)` in the place of every projection that has one."""
    if "kernel" in frozen:
        return function(frozen, adapter)
    return {name: _at_sites(function, child, adapter[name]) if name in adapter else child
            for name, child in frozen.items()}
