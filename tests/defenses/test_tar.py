"""TAR on a toy: the attack, and what is taken where; its gradients on a language model are checked in parity."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvaccine import defenses
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")


def tamper_loss(adapter, frozen, batch, key=None):
    return -toy.no_dropout(adapter, frozen, batch)[0], {}


def retain(adapter, frozen, batch, reference, key=None):
    return toy.no_dropout(adapter, frozen, batch)[0], sum(((adapter[k] - reference[k]) ** 2).sum() for k in adapter)


def batches(inner_steps):
    parts = [toy.batch(10 + i) for i in range(inner_steps)]
    return {"alignment": toy.batch(0), "harmful": toy.batch(1), "adversary": jax.tree.map(
        lambda *x: jnp.concatenate(x), *parts)}, parts


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_the_gradient(inner_steps):
    adapter, frozen = toy.trees()
    defense = defenses.tar(toy.no_dropout, tamper_loss, retain, optax.sgd(0.2), inner_steps, 2.0, 0.5)
    given, parts = batches(inner_steps)
    start = jax.tree.map(lambda x: x - 0.1, adapter)
    grads, state, metrics = jax.jit(defense.gradient)(adapter, frozen, defense.init(start), given, None)
    attacked = adapter
    for part in parts:
        last, g = jax.value_and_grad(lambda w, part=part: toy.no_dropout(w, frozen, part)[0])(attacked)
        attacked = jax.tree.map(lambda w, g: w - 0.2 * g, attacked, g)
    tamper = jax.grad(lambda w: tamper_loss(w, frozen, given["harmful"])[0])(attacked)
    kept = jax.grad(lambda w: sum(retain(w, frozen, given["alignment"], start)))(adapter)
    for name in grads:
        np.testing.assert_allclose(grads[name], 2.0 * tamper[name] + 0.5 * kept[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(state.start[name], start[name])
    np.testing.assert_allclose(metrics["attacked_adversary_loss"], last, rtol=1e-5)
    assert set(metrics) == {"loss", "hidden_distance", "tamper_loss", "adversary_loss", "attacked_adversary_loss"}


def test_arguments_and_batches_are_checked():
    def make(**arguments):
        return defenses.tar(toy.loss_fn, tamper_loss, retain, optax.sgd(0.1), **arguments)

    with pytest.raises(ValueError, match="tar: inner_steps: found 0, expected at least 1"):
        make(inner_steps=0)
    with pytest.raises(ValueError, match="tar: tamper_weight: found inf, expected a finite number >= 0"):
        make(tamper_weight=float("inf"))
    adapter, frozen = toy.trees()
    given, _ = batches(1)
    defense = make(inner_steps=2)
    with pytest.raises(ValueError, match=r"tar: batches\['adversary'\]: found 3 rows, expected a multiple of the 2 st"):
        defense.gradient(adapter, frozen, defense.init(adapter), given, None)
    del given["adversary"]
    with pytest.raises(KeyError, match=r"tar: batches: found \['alignment', 'harmful'\], expected also 'adversary'"):
        defense.gradient(adapter, frozen, defense.init(adapter), given, None)
