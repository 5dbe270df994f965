"""What all parts agree on, below every one of them: data and losses, the model and the defenses."""

from typing import Any

import jax.numpy as jnp

IGNORED = -100  # Hugging Face's label of a position that is not supervised


def at_least_float32(dtype) -> Any:
    """The dtype in which numbers of this dtype are summed: float32, and float64 where they are."""
    return jnp.promote_types(dtype, jnp.float32)
