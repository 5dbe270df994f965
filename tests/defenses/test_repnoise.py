"""RepNoise's sum of terms; the terms are checked in test_activation_losses and in parity."""

import jax
import numpy as np
import pytest

from jaxvaccine import defenses
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCHES = {**toy.batches(), "harmless": toy.batch(5)}


def terms(adapter, frozen, harmful, harmless, noise_key, key=None):
    noise = jax.random.normal(noise_key, adapter["b"].shape)
    return ((adapter["b"] - noise) ** 2).sum(), toy.no_dropout(adapter, frozen, harmful)[0]


def test_the_gradient():
    adapter, frozen = toy.trees()
    defense, key = defenses.repnoise(toy.no_dropout, terms, 0.7, 0.3), jax.random.key(1)
    grads, state, metrics = jax.jit(defense.gradient)(adapter, frozen, (), BATCHES, key)
    noise_key = jax.random.split(key, 3)[2]

    def objective(w):
        noise, ascent = terms(w, frozen, BATCHES["harmful"], None, noise_key)
        return toy.no_dropout(w, frozen, BATCHES["alignment"])[0] + 0.3 * noise - 0.7 * jax.numpy.log(1 + ascent)

    expected = jax.grad(objective)(adapter)
    for name in grads:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5, atol=1e-6)
    assert state == () and set(metrics) == {"loss", "noise", "ascent"}


def test_what_it_needs():
    adapter, frozen = toy.trees()
    defense = defenses.repnoise(toy.loss_fn, terms)
    with pytest.raises(ValueError, match="repnoise: key: found None, expected a PRNG key to draw noise with"):
        defense.gradient(adapter, frozen, (), BATCHES, None)
    with pytest.raises(KeyError, match=r"repnoise: batches: found \['alignment', 'harmful'\], expected also 'harmle"):
        defense.gradient(adapter, frozen, (), toy.batches(), jax.random.key(0))
    for name in ("alpha", "beta"):
        with pytest.raises(ValueError, match=f"repnoise: {name}: found nan, expected a finite number >= 0"):
            defenses.repnoise(toy.loss_fn, terms, **{name: float("nan")})


def test_under_booster():
    """Booster adds its term to RepNoise's gradient."""
    adapter, frozen = toy.trees()
    base = defenses.repnoise(toy.no_dropout, terms, 0.7, 0.3)
    key = jax.random.key(2)
    grads, _, metrics = defenses.booster(toy.no_dropout, 0.5, base=base).gradient(adapter, frozen, (), BATCHES, key)
    alone, _, _ = base.gradient(adapter, frozen, (), BATCHES, jax.random.split(key, 3)[0])
    plain, _, _ = defenses.booster(toy.no_dropout, 0.5).gradient(adapter, frozen, (), BATCHES, key)
    sft, _, _ = defenses.sft(toy.no_dropout).gradient(adapter, frozen, (), BATCHES, key)
    for name in grads:
        np.testing.assert_allclose(grads[name] - alone[name], plain[name] - sft[name], atol=1e-5)
    assert {"noise", "ascent", "harmful_loss"} <= set(metrics)
