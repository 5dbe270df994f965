"""How a next token is chosen from its logits: the most likely one, or a draw that depends on the prompt alone.

Shapes in names: B batch, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p, in transformers' order and meaning.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token, whatever the others say.
      top_k: only that many most likely tokens are drawn from; 0 leaves all in.
      top_p: only the fewest most likely tokens whose probabilities reach this sum are drawn from; 1 leaves all in.
      seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, holds, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number, at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("seed", 0 <= self.seed < 2**32, "0 <= seed < 2**32"),
        ):
            if not holds:
                raise ValueError(f"sampling: {name}: found {getattr(self, name)}, expected {expected}")


GREEDY = Sampling()


def _flatten(sampling: Sampling) -> tuple[tuple, tuple]:
    seed = sampling.seed
    # JAX would take an int for an int32, which holds half of the seeds.
    return (np.uint32(seed) if isinstance(seed, int) else seed,), (sampling.temperature, sampling.top_k, sampling.top_p)


def _unflatten(settings: tuple, seeds: tuple) -> Sampling:
    """Not by the constructor, which checks the seed: within jit it is traced."""
    found = object.__new__(Sampling)
    for field, value in zip(dataclasses.fields(Sampling), (*settings, *seeds), strict=True):
        object.__setattr__(found, field.name, value)
    return found


# The seed is a leaf: for another one, such as every turn of a conversation has, nothing is compiled anew.
jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


def keep_likely(logits_BxV, top_k: int, top_p: float):
    """The logits with -inf in the place of what top-k, then top-p leaves out; equal logits stay or go together."""
    if 0 < top_k < logits_BxV.shape[-1]:
        least_Bx1 = jax.lax.top_k(logits_BxV, top_k)[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
    if top_p < 1:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1)
        # Summed from the least likely on, as in transformers: near 1, float32 has no digits for rare tokens.
        stays_BxV = jnp.cumsum(jax.nn.softmax(sorted_BxV, axis=-1), axis=-1) > 1 - top_p
        least_Bx1 = jnp.min(jnp.where(stays_BxV.at[:, -1].set(True), sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)
    return logits_BxV


def _argmax(x_BxV):
    """jnp.argmax, int32, in two reductions: XLA's CPU backend takes several times as long for a pair's."""
    best_Bx1 = jnp.max(x_BxV, axis=-1, keepdims=True)
    indices_V = jnp.arange(x_BxV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x_BxV == best_Bx1, indices_V, x_BxV.shape[-1] - 1), axis=-1)


def choose(logits_BxV, prompts_B, positions_B, sampling: Sampling):
    """Tokens [B] int32, and whether the logits [B] were finite where it matters.

    A draw's randomness comes from the seed, the prompt's number and the token's position in the answer: it does not
    depend on the batch, or on the row of the batch, that the prompt is in.
    """
    # The maximum is NaN wherever there is one, so it tells whether the row is sound.
    sound_B = jnp.isfinite(jnp.max(logits_BxV, axis=-1))
    if not sampling.temperature:
        return _argmax(logits_BxV), sound_B

    def noise(prompt, position):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), prompt), position)
        return jax.random.gumbel(key, logits_BxV.shape[1:], logits_BxV.dtype)

    likely_BxV = keep_likely(logits_BxV / sampling.temperature, sampling.top_k, sampling.top_p)
    return _argmax(likely_BxV + jax.vmap(noise)(prompts_B, positions_B)), sound_B
