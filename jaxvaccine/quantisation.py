"""Weight matrices of a frozen backbone in 8 or 4 bits, put back into floats where they are multiplied.

A kernel [..., in, out] becomes a NamedTuple of arrays, which goes where the kernel went: it is scanned over, sliced and
handed to `jax.jit` as any tree is. Nobody differentiates with respect to one.

Qwix does not take the place of this file (version 0.1.8, on Linen's scan): it does not see `jnp.matmul`, and then
quantises nothing and says nothing; its `quantize_params` counts a kernel's axes without the layers', so that NF4's
tiles are refused and int8's scales lose the axis that the scan goes over.
"""

import functools
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.conventions import at_least_float32

Kind = Literal["none", "int8", "nf4"]
# Weights that share one of NF4's scales.
BLOCK = 64
# arXiv 2305.14314, appendix E: quantiles of the normal distribution, eight below zero, zero, seven above, over the
# largest.
NF4_LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


class Int8(NamedTuple):
    """W = values · scale, a scale to every output: its largest |W| / 127. 8 + 32 / in bits a weight (8.01 at 4096)."""

    values: jax.Array  # [..., in, out] int8, from -127 to 127
    scale: jax.Array  # [..., 1, out] float32

    @classmethod
    def of(cls, kernel) -> Self:
        kernel = kernel.astype(at_least_float32(kernel.dtype))
        scale = (jnp.abs(kernel).max(axis=-2, keepdims=True) / 127).astype(jnp.float32)
        return cls(jnp.clip(jnp.rint(kernel / _not_zero(scale)), -127, 127).astype(jnp.int8), scale)

    def dequantise(self, dtype) -> jax.Array:
        return (self.values * self.scale.astype(at_least_float32(dtype))).astype(dtype)


class Nf4(NamedTuple):
    """W = level[code] · scale, a scale to every 64 inputs of an output: their largest |W|. 4.25 bits a weight.

    The blocks are those of bitsandbytes, whose weights are [out, in]; what is over at the end of a column is a block of
    its own. The scales are bfloat16: their own rounding, 0.1%, is lost in that of the codes, 9%, and float32 would
    take a quarter of a bit more.
    """

    codes: jax.Array  # [..., in / 2, out] uint8: of two inputs that follow each other, the first in the upper half
    scale: jax.Array  # [..., ceil(in / 64), out] bfloat16

    @classmethod
    def of(cls, kernel) -> Self:
        *stack, size, out = kernel.shape
        if size % 2:
            raise ValueError(f"nf4: a kernel's inputs: found {size}, expected an even number: two share a byte")
        kernel = kernel.astype(at_least_float32(kernel.dtype))
        whole = jnp.pad(kernel, [(0, 0)] * len(stack) + [(0, -size % BLOCK), (0, 0)])
        scale = jnp.abs(whole).reshape(*stack, -1, BLOCK, out).max(axis=-2).astype(jnp.bfloat16)
        within = kernel / _over_blocks(_not_zero(scale), size, kernel.dtype)
        between = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
        code = sum((within > float(middle)).astype(jnp.uint8) for middle in between)
        return cls(code[..., ::2, :] << 4 | code[..., 1::2, :], scale)

    def dequantise(self, dtype) -> jax.Array:
        *stack, pairs, out = self.codes.shape
        code = jnp.stack([self.codes >> 4, self.codes & 15], axis=-2).reshape(*stack, 2 * pairs, out)
        levels = jnp.asarray(NF4_LEVELS, at_least_float32(dtype)).at[code].get(mode="promise_in_bounds")
        return (levels * _over_blocks(self.scale, 2 * pairs, levels.dtype)).astype(dtype)


Quantised = Int8 | Nf4
KINDS: dict[str, type[Int8] | type[Nf4]] = {"int8": Int8, "nf4": Nf4}


def _not_zero(scale):
    return jnp.where(scale == 0, 1, scale)


def _over_blocks(scale, size: int, dtype):
    """[..., in, out], the scale of each weight."""
    return jnp.repeat(scale.astype(dtype), BLOCK, axis=-2)[..., :size, :]


def quantise(kernel, kind: Kind):
    """The kernel [..., in, out] as `Int8` or `Nf4`; as it is, of kind "none".

    Raises:
      ValueError: the kind is none of these, or its inputs are an odd number, of NF4.
    """
    if kind == "none":
        return kernel
    if kind not in KINDS:
        raise ValueError(f"quantisation: found {kind!r}, expected one of none, {', '.join(KINDS)}")
    return KINDS[kind].of(kernel)


def dequantise(kernel, dtype) -> jax.Array:
    """The weights [..., in, out] in that type, of a quantised kernel; any other as it is."""
    return kernel.dequantise(dtype) if isinstance(kernel, Quantised) else kernel


def _map_kernels(function, tree):
    """The tree with every dense layer's kernel replaced; embeddings, output head, norms and biases stay."""
    return {name: _map_kernels(function, child) if isinstance(child, dict)
            else function(child) if name == "kernel" else child for name, child in tree.items()}


def quantise_kernels(frozen, kind: Kind):
    """`params` of a model with the layers' seven kernels quantised; the rest stays. Raises as `quantise`."""
    return _map_kernels(functools.partial(quantise, kind=kind), frozen)


def dequantise_kernels(frozen, dtype):
    """What a quantised backbone stands for: the same tree with kernels of that type."""
    return _map_kernels(functools.partial(dequantise, dtype=dtype), frozen)


def is_quantised(frozen) -> bool:
    """Whether a tree has a kernel that is."""
    return any(isinstance(leaf, Quantised) for leaf in jax.tree.leaves(
        frozen, is_leaf=lambda x: isinstance(x, Quantised)))
