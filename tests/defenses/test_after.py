"""Passes one after another: the same numbers, a branch alone and over lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import defenses
from jaxvaccine.defenses.base import after
from jaxvaccine.losses import causal_lm_loss
from tests import jaxprs, tiny


def passes(x):
    """Two passes, the second behind the first."""
    first = jnp.sin(x)
    return after({"first": first}, lambda: {"second": first * 2, "count": x.sum()})


def test_what_it_gives():
    found = jax.jit(passes)(jnp.arange(3.0))
    np.testing.assert_allclose(found["second"], 2 * np.sin(np.arange(3.0)), rtol=1e-6)
    assert found["count"] == 3


def test_nan_stays_nan():
    found = jax.jit(passes)(jnp.array([jnp.nan, 1.0]))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf])
def test_infinity_is_a_number(value):
    found = jax.jit(lambda x: after(x, lambda: x * 0 + 1.0))(jnp.array(value))
    assert np.isnan(found)  # inf · 0: the function was called, and no less


def test_over_lanes():
    """One branch for all lanes, taken unless all are NaN; a lane's NaN stays its own."""
    lanes = jnp.array([[0.5, 1.0], [jnp.nan, 2.0]])
    jaxpr = jax.make_jaxpr(jax.vmap(passes))(lanes)
    conditions = [e for e in jaxprs.equations(jaxpr) if e.primitive.name == "cond"]
    assert [e.invars[0].aval.shape for e in conditions] == [()]
    found = jax.jit(jax.vmap(passes))(lanes)
    np.testing.assert_allclose(found["second"][0], 2 * np.sin(lanes[0]), rtol=1e-6)
    assert np.isnan(found["count"][1]) and np.isnan(found["second"][1, 0])


@pytest.mark.parametrize("make, branches", [
    (defenses.sft, 0), (defenses.vaccine, 1), (lambda of: defenses.t_vaccine(of, layers=2), 1), (defenses.booster, 2),
    (lambda of: defenses.booster(of, base=defenses.vaccine(of)), 3), (lambda of: defenses.booster(of, exact=True), 1)])
def test_every_pass_but_the_first_waits(make, branches):
    """By the branches of a defense, those of T-Vaccine's schedule aside."""
    loss_fn = causal_lm_loss(tiny.model())
    adapter, frozen = tiny.trees(tiny.model())
    defense, batch = make(loss_fn), tiny.batch()
    jaxpr = jaxprs.live_jaxpr(
        lambda adapter, state: defense.gradient(
            adapter, frozen, state, {"alignment": batch, "harmful": batch}, jax.random.key(0))[0],
        adapter, jax.eval_shape(defense.init, adapter))

    def gives_nan(branch):
        return any(getattr(v, "val", 0) != getattr(v, "val", 0) for e in branch.eqns for v in e.invars)

    waiting = [e for e in jaxpr.eqns if e.primitive.name == "cond"
               and any(gives_nan(b) for b in jaxprs.inner_jaxprs(e))]
    assert len(waiting) == branches
