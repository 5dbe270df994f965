"""RepNoise: representation noising (arXiv 2405.14577)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import Defense, LossFn, check_not_negative, take_batch


class RepNoiseKeys(NamedTuple):
    """What a step's key is split into."""

    loss: jax.Array  # dropout of the alignment loss
    terms: jax.Array  # dropout of both terms
    noise: jax.Array  # the noise itself


def repnoise_keys(key: jax.Array) -> RepNoiseKeys:
    return RepNoiseKeys(*jax.random.split(key, 3))


def repnoise(loss_fn: LossFn, terms_fn: Callable, alpha: float = 1.0, beta: float = 0.001) -> Defense:
    """∇(f(w) + beta · noise(w) − alpha · log(1 + ascent(w))) (RepNoise's loss, as its authors' program has it).

    noise is how far the representations of harmful data are from Gaussian noise, ascent the harmful loss, read from
    every layer. f is the loss on the batch "alignment"; the paper's are the harmless answers to the harmful prompts.

    Args:
      loss_fn: any loss (`base.LossFn`).
      terms_fn: such as `activation_losses.noise_and_ascent`: (adapter, frozen, harmful, harmless, noise_key, key=None)
        -> (noise, ascent), scalars.
      alpha: weight of the logarithm.
      beta: weight of the noise.

    Returns:
      A stateless defense that needs the batches "alignment", "harmful" and "harmless" (row by row other answers to the
      harmful prompts) and a key, with which the noise is drawn. Metrics: loss f, noise, ascent.
    """
    check_not_negative("repnoise", alpha=alpha, beta=beta)

    def gradient(adapter, frozen, state, batches, key):
        if key is None:
            raise ValueError("repnoise: key: found None, expected a PRNG key to draw noise with")
        alignment, harmful, harmless = (
            take_batch(batches, name, "repnoise") for name in ("alignment", "harmful", "harmless"))
        loss_key, terms_key, noise_key = repnoise_keys(key)

        def objective(adapter):
            loss, _ = loss_fn(adapter, frozen, alignment, key=loss_key)
            noise, ascent = terms_fn(adapter, frozen, harmful, harmless, noise_key, key=terms_key)
            return loss + beta * noise - alpha * jnp.log1p(ascent), {"loss": loss, "noise": noise, "ascent": ascent}

        grads, metrics = jax.grad(objective, has_aux=True)(adapter)
        return grads, state, metrics

    return Defense(init=lambda adapter: (), gradient=gradient)
