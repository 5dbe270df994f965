"""Products in full precision, and what their gradients multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine.products import einsum_in_full
from tests import jaxprs

SHAPES = {"ND,DV->NV": ((5, 3), (3, 4)), "...D,DV->...V": ((2, 5, 3), (3, 4)),
          "BTKGH,BSKH->BKGTS": ((2, 3, 2, 2, 4), (2, 3, 2, 4))}


def operands(subscripts, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in SHAPES[subscripts]]


@pytest.mark.parametrize("subscripts", SHAPES)
def test_values_and_gradients(float64, subscripts):
    x, y = operands(subscripts, jnp.float64)

    def loss(product):
        return lambda x, y: jnp.sin(product(x, y)).sum()

    found, expected = (jax.value_and_grad(loss(product), argnums=(0, 1))(x, y) for product in (
        lambda x, y: einsum_in_full(subscripts, x, y), lambda x, y: jnp.einsum(subscripts, x, y)))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("subscripts", SHAPES)
def test_low_precision(subscripts):
    """Kept in float32; the gradients' products are of bfloat16 alone, and near those of float32."""
    x, y = operands(subscripts, jnp.bfloat16)
    assert einsum_in_full(subscripts, x, y).dtype == jnp.float32

    def gradients(x, y):
        return jax.grad(lambda x, y: jnp.sin(einsum_in_full(subscripts, x, y)).sum(), argnums=(0, 1))(x, y)

    products = [e for e in jaxprs.live_equations(gradients, x, y) if e.primitive.name == "dot_general"]
    assert len(products) == 3 and {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    exact = gradients(x.astype(jnp.float32), y.astype(jnp.float32))
    for one, other in zip(gradients(x, y), exact, strict=True):
        assert one.dtype == jnp.bfloat16
        # The cotangent and the result are rounded, each to 8 bits.
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-7, atol=2**-7 * float(jnp.abs(other).max()))
