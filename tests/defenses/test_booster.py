"""Booster's arguments; its gradient is checked in test_derivatives and in parity."""

import jax
import jax.numpy as jnp
import pytest

from jaxvaccine import defenses
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lam", "alpha"])
def test_arguments_are_checked(name, value):
    with pytest.raises(ValueError, match=f"booster: {name}: found {value}, expected a finite number >= 0"):
        defenses.booster(toy.loss_fn, **{name: value})


def test_the_harmful_batch_is_named_if_missing():
    adapter, frozen = toy.trees()
    with pytest.raises(KeyError, match=r"booster: batches: found \['alignment'\], expected also 'harmful'"):
        defenses.booster(toy.loss_fn).gradient(adapter, frozen, (), {"alignment": toy.batch()}, None)


def test_it_keeps_its_bases_state_and_metrics():
    adapter, frozen = toy.trees()
    defense = defenses.booster(toy.loss_fn, base=defenses.t_vaccine(toy.loss_fn, layers=2))
    state = defense.init(adapter)
    _, new_state, metrics = jax.eval_shape(defense.gradient, adapter, frozen, state, toy.batches(), jax.random.key(0))
    assert isinstance(state, defenses.TVaccineState)
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
    assert set(metrics) == {"loss", "activation_gradient_norm", "probabilities", "active_layers", "harmful_loss",
                            "perturbed_harmful_loss", "harmful_gradient_norm"}


def test_it_composes_with_itself():
    """A base may be any defense."""
    twice = defenses.booster(toy.no_dropout, 1.0, base=defenses.booster(toy.no_dropout, 1.0))
    (found, _, _), = toy.run(twice, 1)
    (expected, _, _), = toy.run(defenses.booster(toy.no_dropout, 2.0), 1)
    for name in found:
        assert abs(found[name] - expected[name]).max() < 1e-5


def test_without_its_last_term():
    """The gradient of f + lam · h, of what the base trains; nothing is simulated."""
    adapter, frozen = toy.trees()
    f, h = toy.batches()["alignment"], toy.batches()["harmful"]
    defense = defenses.booster(toy.no_dropout, 0.7, last_term=False)
    grads, _, metrics = jax.jit(defense.gradient)(adapter, frozen, (), toy.batches(), None)
    expected = jax.grad(lambda adapter: toy.no_dropout(adapter, frozen, f)[0] + 0.7 * toy.no_dropout(
        adapter, frozen, h)[0])(adapter)
    assert set(metrics) == {"loss", "harmful_loss", "harmful_gradient_norm"}
    for name in expected:
        assert abs(grads[name] - expected[name]).max() < 1e-5 * abs(expected[name]).max() + 1e-7
    base = defenses.t_vaccine(toy.no_dropout, layers=2)
    defense = defenses.booster(toy.no_dropout, 0.7, base=base, last_term=False)
    grads, state, _ = jax.jit(defense.gradient)(adapter, frozen, base.init(adapter), toy.batches(), jax.random.key(0))
    assert all((abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 0).tolist() == state.active_layers.tolist()
               for leaf in jax.tree.leaves(grads))


def test_exact_has_its_last_term():
    with pytest.raises(ValueError, match="booster: exact: found True, expected False without the last term"):
        defenses.booster(toy.loss_fn, exact=True, last_term=False)


def test_it_trains_without_a_key():
    adapter, frozen = toy.trees()
    defense = defenses.booster(toy.loss_fn)
    found = jax.jit(defense.gradient)(adapter, frozen, (), toy.batches(), None)[0]
    (expected, _, _), = toy.run(defenses.booster(toy.no_dropout), 1)
    for name in found:
        assert abs(found[name] - expected[name]).max() < 1e-6
