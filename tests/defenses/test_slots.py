"""T-Vaccine holds the perturbations of S layers, and nothing of its probe: the same numbers in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import defenses
from jaxvaccine.defenses.vaccine import activation_gradient, site_norms
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.perturbations import SiteNorms, Slots, in_slots, taking_slots
from tests import jaxprs, tiny
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")


def of_all_layers(loss_fn):
    """A loss that knows perturbations of all layers alone."""
    def call(adapter, frozen, batch, perturbations=None, key=None):
        assert not isinstance(perturbations, Slots | SiteNorms)
        loss, aux = loss_fn(adapter, frozen, batch, perturbations, key)
        return loss, {name: value for name, value in aux.items() if name != "slots"}

    return call


def problem(remat="full", **given):
    model = tiny.model(remat=remat, dtype=jnp.float64, **given)
    adapter, frozen = tiny.trees(model)
    return causal_lm_loss(model), jax.tree.map(jnp.float64, adapter), frozen, tiny.batch()


def test_in_slots():
    values = {"site": jnp.arange(6.0).reshape(3, 2)}
    active = jnp.array([False, True, False, True, True, False])
    found = in_slots(active, values)
    np.testing.assert_array_equal(found.of_layer, [3, 0, 3, 1, 2, 3])
    seen = []

    def loss_fn(adapter, frozen, batch, perturbations=None, key=None):
        seen.append(perturbations)
        return jnp.zeros(()), {"perturbations": {"site": jnp.zeros((6, 2))}}

    taking_slots(loss_fn)(None, None, None, found)
    np.testing.assert_array_equal(seen[-1]["site"], [[0, 0], [0, 1], [0, 0], [2, 3], [4, 5], [0, 0]])
    dense = {"site": jnp.ones((6, 2))}
    taking_slots(loss_fn)(None, None, None, dense)
    assert seen[-1] is dense


@pytest.mark.parametrize("remat, given", [
    ("full", {}), ("none", {}), pytest.param("dots", {"config": tiny.FAMILIES["gemma2"]}, marks=pytest.mark.long)])
def test_the_gradients_of_slots_are_those_of_all_layers(float64, remat, given):
    """Adapter, slots and norms of a language model, against the tree of all layers with zeros in it."""
    loss_fn, adapter, frozen, batch = problem(remat, **given)
    total = tiny.CONFIG.num_layers
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=(2, *x.shape[1:]))), jax.eval_shape(
        lambda: loss_fn(adapter, frozen, batch)[1]["perturbations"]))

    @jax.jit
    def gradients(active):
        def of(loss_fn):
            return jax.grad(lambda adapter, values: taking_slots(loss_fn)(
                adapter, frozen, batch, in_slots(active, values))[0], argnums=(0, 1))(adapter, values)
        return of(loss_fn), of(of_all_layers(loss_fn))

    for layers in ([0, 2], [1, total - 1]):
        found, expected = gradients(jnp.isin(jnp.arange(total), jnp.array(layers)))
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[1]))
        for one, other in zip(found, expected, strict=True):
            assert tiny.relative_difference(one, other) < 1e-12


@pytest.mark.parametrize("of", ["slots", "all layers"])
def test_site_norms(float64, of):
    loss_fn, adapter, frozen, batch = problem()
    _, sites = jax.jit(lambda: activation_gradient(loss_fn, adapter, frozen, batch, None))()
    expected = np.sqrt(sum((np.asarray(leaf) ** 2).sum(axis=(1, 2, 3)) for leaf in jax.tree.leaves(sites)))
    taken = taking_slots(loss_fn if of == "slots" else of_all_layers(loss_fn))
    found = jax.jit(lambda: site_norms(taken, adapter, frozen, batch, None))()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_site_norms_of_another_loss(float64):
    adapter, frozen = toy.trees()
    _, sites = activation_gradient(toy.no_dropout, adapter, frozen, toy.batch(), None)
    found = site_norms(taking_slots(toy.no_dropout), adapter, frozen, toy.batch(), None)
    np.testing.assert_allclose(found, np.sqrt((np.asarray(sites["site"]) ** 2).sum(axis=(1, 2))), rtol=1e-12)


def test_t_vaccine_is_the_same_with_both(float64):
    """Whole steps: probe, draw, norm and perturbation."""
    loss_fn, adapter, frozen, _ = problem()
    batches = [{name: tiny.batch(2 * step + i) for i, name in enumerate(("alignment", "harmful"))} for step in range(4)]
    runs = []
    for of in (loss_fn, of_all_layers(loss_fn)):
        defense = defenses.t_vaccine(of, rho=3.0, layers=2, sample_every=2, probe_every=2)
        gradient, state, out = jax.jit(defense.gradient), defense.init(adapter), []
        for step, batch in enumerate(batches):
            grads, state, metrics = gradient(adapter, frozen, state, batch, jax.random.key(step))
            out.append((grads, state.probabilities, metrics["activation_gradient_norm"]))
            assert state.active_layers.sum() == 2
        runs.append((out, state.active_layers))
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    assert tiny.relative_difference(runs[0][0], runs[1][0]) < 1e-12


def test_no_perturbations_of_all_layers():
    """Nothing of [L, B, T, D] is computed but what the loop over layers keeps: the layers' inputs, a pass each."""
    model = tiny.model(remat="full")
    adapter, frozen = tiny.trees(model)
    batch = tiny.batch()
    site = (tiny.CONFIG.num_layers, *batch["input_ids"].shape, tiny.CONFIG.hidden_size)

    def count(make):
        defense = make(causal_lm_loss(model))
        return jaxprs.output_shapes(jaxprs.live_equations(
            lambda adapter, state, key: defense.gradient(
                adapter, frozen, state, {"alignment": batch, "harmful": batch}, key)[0],
            adapter, defense.init(adapter), jax.random.key(0))).count(site)

    inputs = count(defenses.sft)
    assert count(lambda of: defenses.t_vaccine(of, layers=2)) == 3 * inputs  # the probe's pass too
    assert count(defenses.vaccine) > 2 * inputs


@pytest.mark.long
def test_memory(optimized):
    """By XLA's buffer assignment: at least the gradients and the perturbations of the layers that are not drawn."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=16, hidden_size=64, intermediate_size=96)
    model = tiny.model(remat="full", config=config)
    adapter, frozen = jax.eval_shape(lambda: tiny.trees(model))
    rows, length, layers = 8, 128, 2
    batch = dict.fromkeys(("input_ids", "labels", "attention_mask"), jax.ShapeDtypeStruct((rows, length), jnp.int32))

    def temporary(loss_fn):
        defense = defenses.t_vaccine(loss_fn, layers=layers)
        return jax.jit(defense.gradient).lower(
            adapter, frozen, jax.eval_shape(defense.init, adapter), {"alignment": batch, "harmful": batch},
            jax.eval_shape(lambda: jax.random.key(0))).compile().memory_analysis().temp_size_in_bytes

    loss_fn = causal_lm_loss(model)
    saved = temporary(of_all_layers(loss_fn)) - temporary(loss_fn)
    assert saved > 2 * (config.num_layers - layers) * rows * length * config.hidden_size * 4
