"""A few rows at a time give the whole batch's numbers: losses, gradients, and all that defenses make of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.benchmarks import costs
from experiments.benchmarks.step import methods
from jaxvaccine import defenses
from jaxvaccine.activation_losses import loss_and_hidden_distance
from jaxvaccine.defenses.vaccine import activation_gradient, site_norms
from jaxvaccine.experiment.methods import Booster, Sft
from jaxvaccine.losses import causal_lm_loss, loss_and_kl, negative_entropy
from jaxvaccine.microbatches import in_microbatches, supervised_count
from jaxvaccine.perturbations import SiteNorms, in_slots, taking_slots
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")
# Sums in another order, in float64.
TOLERANCE = 1e-11


def models(size, **given):
    model = tiny.model(dtype=jnp.float64, **given)
    return model, model.clone(microbatch_size=size)


def trees(model):
    adapter, frozen = tiny.trees(model)
    return jax.tree.map(jnp.float64, adapter), frozen


def uneven(rows, seed=0):
    """A batch whose rows have very different numbers of supervised positions, one of them none."""
    batch = tiny.batch(seed, rows=rows)
    labels = batch["labels"].copy()
    for row in range(rows):
        labels[row, :min(row, 3) * 4] = -100
    labels[rows // 2] = -100
    return {**batch, "labels": labels}


def same(found, expected):
    jax.tree.map(lambda x: np.testing.assert_array_equal(np.isfinite(x), True), found)
    assert tiny.relative_difference(found, expected) < TOLERANCE


long = pytest.mark.long
QUICK = ("t_vaccine", "kl, while fine-tuning")


@pytest.mark.parametrize("rows, size", [(5, 2), *(pytest.param(*of, marks=long) for of in ((4, 2), (3, 1), (7, 3)))])
def test_loss_and_all_of_its_gradients(float64, rows, size):
    """Adapter, frozen weights and perturbations, where rows can and can't be dealt out evenly."""
    whole, parts = models(size)
    adapter, frozen = trees(whole)
    batch = uneven(rows)
    sites = jax.tree.map(lambda x: 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), jax.eval_shape(
        lambda: causal_lm_loss(whole)(adapter, frozen, batch)[1]["perturbations"]))

    def of(model):
        loss_fn = causal_lm_loss(model)
        return jax.jit(jax.value_and_grad(lambda *trees: loss_fn(*trees[:2], batch, trees[2])[0], argnums=(0, 1, 2)))(
            adapter, frozen, sites)

    found, expected = of(parts), of(whole)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[1]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        same(one, other)


@settings(max_examples=20)
@given(rows=st.integers(1, 6), size=st.integers(1, 7), supervised=st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_every_position_counts_once(float64, rows, size, supervised):
    """The mean over any supervised positions, 0 without any, by a loss that is one number a row."""
    labels = np.full((rows, 10), -100)
    for row, count in enumerate(supervised[:rows]):
        labels[row, 1:1 + count] = 1
    batch = {"input_ids": np.arange(rows * 10).reshape(rows, 10), "labels": labels,
             "attention_mask": np.ones((rows, 10), int)}

    def mean_fn(adapter, frozen, batch, perturbations, key):
        counted = jnp.where(batch["labels"][:, 1:] != -100, batch["input_ids"][:, 1:] * adapter, 0.0).sum()
        return counted / jnp.maximum(supervised_count(batch), 1)

    adapter = jnp.float64(3.0)
    value, grad = jax.value_and_grad(lambda adapter: in_microbatches(mean_fn, size, adapter, None, batch))(adapter)
    chosen = batch["input_ids"][labels != -100]
    expected = chosen.mean() if chosen.size else 0.0
    np.testing.assert_allclose([value, grad], [3 * expected, expected], rtol=1e-12)


@long
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=long)])
def test_perturbations_of_some_layers_and_norms(float64, size):
    whole, parts = models(size)
    adapter, frozen = trees(whole)
    batch, active = uneven(5), jnp.array([True, False, False, True])

    def of(model):
        loss_fn = taking_slots(causal_lm_loss(model))
        _, sites = activation_gradient(loss_fn, adapter, frozen, batch, None)
        slots = jax.tree.map(lambda x: x[:2], sites)
        grads = jax.grad(lambda adapter, slots: loss_fn(adapter, frozen, batch, in_slots(active, slots))[0],
                         argnums=(0, 1))(adapter, slots)
        return sites, grads, site_norms(loss_fn, adapter, frozen, batch, None)

    for found, expected in zip(jax.jit(of, static_argnums=0)(parts), jax.jit(of, static_argnums=0)(whole), strict=True):
        same(found, expected)


@long
def test_norms_of_a_loss_times_a_number(float64):
    """A norm's square grows with the square of the loss's factor."""
    def of(model):
        return jax.jit(jax.grad(lambda squared: 3 * causal_lm_loss(model)(
            *trees(model), uneven(4), SiteNorms({"layers": {"attention": {"output": squared}}}))[0]))(jnp.zeros(4))

    same(*map(of, models(2)))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else long) for name in sorted(methods(tiny.model()))])
def test_every_defense(float64, name):
    """Two steps of each: gradients, states and metrics, of batches that the microbatches don't divide."""
    kinds = {"alignment": 5, "user": 5, "harmful": 4, "harmless": 4, "adversary": 12}
    results = []
    for model in models(2):
        adapter, frozen = trees(model)
        defense = methods(model)[name]
        gradient, state, found = jax.jit(defense.gradient), defense.init(adapter), []
        for step in range(2):
            batches = {kind: uneven(rows, seed=step) for kind, rows in kinds.items()}
            grads, state, metrics = gradient(adapter, frozen, state, batches, jax.random.key(step))
            adapter = jax.tree.map(lambda w, g: w - 0.01 * g, adapter, grads)
            found.append((grads, metrics))
        results.append((found, state))
    (found, state), (expected, expected_state) = results[1], results[0]
    assert tiny.relative_difference(found, expected) < TOLERANCE
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), state, expected_state)


@long
def test_the_exact_booster(float64):
    """Which differentiates a gradient."""
    results = []
    for model in models(2):
        adapter, frozen = trees(model)
        defense = Booster(exact=True, base=Sft()).make(model)
        results.append(jax.jit(defense.gradient)(
            adapter, frozen, defense.init(adapter), {"alignment": uneven(3), "harmful": uneven(5)}, None)[0])
    same(*results[::-1])


@long
def test_losses_with_a_reference(float64):
    for make in (loss_and_kl, loss_and_hidden_distance):
        results = []
        for model in models(2):
            adapter, frozen = trees(model)
            reference = jax.tree.map(lambda x: 0.9 * x, adapter)

            def of(adapter, model=model, frozen=frozen, reference=reference, make=make):
                loss, distance = make(model)(adapter, frozen, uneven(5), reference)
                return 2 * loss + 3 * distance, (loss, distance)

            results.append(jax.jit(jax.value_and_grad(of, has_aux=True))(adapter))
        same(*results[::-1])
    same(*(jax.jit(lambda model=model: negative_entropy(model)(*trees(model), uneven(5))[0])() for model in models(2)))


@pytest.mark.parametrize("make", [
    defenses.sft, pytest.param(functools.partial(defenses.t_vaccine, layers=2), marks=long)])
def test_lanes(float64, make):
    """Adapters side by side over one backbone."""
    _, parts = models(2)
    adapter, frozen = trees(parts)
    both = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), adapter)
    loss_fn, batch = causal_lm_loss(parts), uneven(5)
    defense = make(loss_fn)

    def of(adapter):
        return defense.gradient(adapter, frozen, defense.init(adapter), {"alignment": batch, "harmful": batch},
                                jax.random.key(0))[0]

    found = jax.jit(jax.vmap(of))(both)
    for i in range(2):
        same(jax.tree.map(lambda x, i=i: x[i], found), jax.jit(of)(jax.tree.map(lambda x, i=i: x[i], both)))


@long
def test_dropout_differs_between_microbatches(float64):
    """Each draws its own; the gradient is that of the same draws."""
    _, model = models(1, dropout=0.5)
    adapter, frozen = trees(model)
    row = tiny.batch(rows=1)
    twice = {name: np.concatenate([x, x]) for name, x in row.items()}
    of = jax.jit(lambda batch, key: jax.value_and_grad(
        lambda adapter: causal_lm_loss(model)(adapter, frozen, batch, key=key)[0])(adapter))
    key = jax.random.key(0)
    one, other = (of(row, jax.random.fold_in(key, i)) for i in range(2))
    assert one[0] != other[0]
    same(of(twice, key), jax.tree.map(lambda a, b: (a + b) / 2, one, other))


def test_nothing_is_computed_twice():
    """As many products as the whole batch's, of every defense whose losses are one number."""
    batch = tiny.batch(rows=4)
    flops = {}
    for size in (0, 2):
        model = tiny.model().clone(microbatch_size=size)
        adapter, frozen = jax.eval_shape(lambda model=model: tiny.trees(model))
        for name in ("sft", "vaccine", "t_vaccine", "booster"):
            defense = methods(model)[name]
            always, due = costs.count(
                lambda adapter, frozen, state, key, defense=defense: defense.gradient(
                    adapter, frozen, state, {"alignment": batch, "harmful": batch}, key)[0],
                adapter, frozen, jax.eval_shape(defense.init, adapter), jax.eval_shape(lambda: jax.random.key(0)),
                layers=tiny.CONFIG.num_layers)
            flops[name, size] = always.flops, due.flops
    for name, size in list(flops):
        assert flops[name, size] == flops[name, 0]


def test_memory(optimized):
    """By XLA's buffer assignment: of 16 rows, 2 at a time, nearly as little as of 2."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=8, hidden_size=64, intermediate_size=96)

    def temporary(rows, size):
        model = tiny.model(config=config).clone(microbatch_size=size)
        adapter, frozen = jax.eval_shape(lambda: tiny.trees(model))
        batch = dict.fromkeys(("input_ids", "labels", "attention_mask"), jax.ShapeDtypeStruct((rows, 128), jnp.int32))
        return jax.jit(defenses.sft(causal_lm_loss(model)).gradient).lower(
            adapter, frozen, (), {"alignment": batch}, None).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16, 2) < 1.2 * temporary(2, 0) < 0.3 * temporary(16, 0)
