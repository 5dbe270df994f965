"""Matrix products that are summed, and kept, in at least float32."""

import functools

import jax
import jax.numpy as jnp

from jaxvaccine.conventions import at_least_float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_in_full(subscripts: str, x, y):
    """jnp.einsum of two arrays of one dtype, in at least float32.

    In bfloat16 its gradients are products of bfloat16, with the cotangent rounded first, as PyTorch has them. JAX's own
    rule multiplies the float32 cotangent, for which XLA makes a float32 copy of the other operand: of the whole output
    head, 3.4 GiB of Gemma2-9B's.
    """
    return jnp.einsum(subscripts, x, y, preferred_element_type=at_least_float32(x.dtype))


def _fwd(subscripts, x, y):
    return einsum_in_full(subscripts, x, y), (x, y)


def _bwd(subscripts, operands, cotangent):
    _, pull = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
    return pull(cotangent.astype(operands[0].dtype))


einsum_in_full.defvjp(_fwd, _bwd)
