"""The defenses' gradients in float64 against finite differences and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import defenses, losses
from jaxvaccine.defenses import base
from jaxvaccine.defenses.vaccine import activation_gradient
from jaxvaccine.llama_config import LlamaConfig
from tests import tiny
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("float64", "quick_compile")

LAM, ALPHA, RHO = 5.0, 0.1, 0.5
RELATIVE = 1e-6


@pytest.fixture(scope="module", params=["toy", "llama"])
def problem(request, float64):
    """(loss_fn, adapter, frozen, batches)."""
    if request.param == "toy":
        return toy.no_dropout, *toy.trees(), toy.batches()
    config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
                              num_kv_heads=1, head_dim=8)
    model = tiny.model(rank=2, config=config, dtype=jnp.float64, remat="none", targets=("v_proj", "up_proj"))
    batches = {"alignment": tiny.batch(0, 2, 8, 31), "harmful": tiny.batch(1, 2, 8, 31)}
    return losses.causal_lm_loss(model, block=4), *tiny.trees(model), batches


def gradient(defense, adapter, frozen, batches, key=None):
    return jax.jit(defense.gradient)(adapter, frozen, defense.init(adapter), batches, key)


def differ(found, expected):
    return tiny.relative_difference(found, expected)


def check_slopes(fn, adapter, grads, step=1e-3):
    for seed in range(3):
        direction = tiny.direction(adapter, seed)
        expected = tiny.slope(fn, (adapter,), (direction,), step)
        assert abs(tiny.dot(grads, direction) - expected) < RELATIVE * abs(expected)


@pytest.mark.parametrize("problem", ["toy"], indirect=True)  # the language model's is in test_losses
def test_sft(problem):
    loss_fn, adapter, frozen, batches = problem
    compiled = jax.jit(lambda adapter: loss_fn(adapter, frozen, batches["alignment"])[0])
    grads, _, metrics = gradient(defenses.sft(loss_fn), adapter, frozen, batches)
    check_slopes(compiled, adapter, grads)
    np.testing.assert_allclose(metrics["loss"], compiled(adapter), rtol=1e-12)


# Of a language model, second derivatives take half a minute to compile.
@pytest.mark.parametrize("problem", ["toy", pytest.param("llama", marks=pytest.mark.long)], indirect=True)
def test_exact_booster(problem):
    """The regularizer h(w) − h(w − alpha ∇h / (‖∇h‖ + 1e-7)), written from the equation."""
    loss_fn, adapter, frozen, batches = problem

    def harmful_loss(adapter):
        return loss_fn(adapter, frozen, batches["harmful"])[0]

    @jax.jit
    def regularizer(adapter):
        grads = jax.grad(harmful_loss)(adapter)
        norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        stepped = jax.tree.map(lambda w, g: w - ALPHA * g / (norm + 1e-7), adapter, grads)
        return harmful_loss(adapter) - harmful_loss(stepped)

    def no_gradient(adapter, frozen, state, batches, key):
        return jax.tree.map(jnp.zeros_like, adapter), state, {}

    # By itself, so that the alignment loss's larger slope can't cover for it.
    nothing = defenses.Defense(lambda adapter: (), no_gradient)
    alone, _, metrics = gradient(defenses.booster(loss_fn, 1.0, ALPHA, nothing, exact=True), adapter, frozen, batches)
    check_slopes(regularizer, adapter, alone)
    np.testing.assert_allclose(
        metrics["harmful_loss"] - metrics["perturbed_harmful_loss"], regularizer(adapter), rtol=1e-10)

    sft, _, _ = gradient(defenses.sft(loss_fn), adapter, frozen, batches)
    found, _, _ = gradient(defenses.booster(loss_fn, LAM, ALPHA, exact=True), adapter, frozen, batches)
    assert differ(found, jax.tree.map(lambda f, r: f + LAM * r, sft, alone)) < 1e-12


def test_vaccine_with_the_perturbation_held(problem):
    loss_fn, adapter, frozen, batches = problem
    batch = batches["alignment"]
    _, site_grads = jax.jit(activation_gradient, static_argnums=0)(loss_fn, adapter, frozen, batch, None)
    norm = float(base.global_norm(site_grads))
    held = jax.tree.map(lambda g: RHO * g / (norm + 1e-7), site_grads)
    np.testing.assert_allclose(tiny.dot(held, held) ** 0.5, RHO, rtol=1e-4)
    compiled = jax.jit(lambda adapter, perturbations: loss_fn(adapter, frozen, batch, perturbations)[0])
    grads, _, metrics = gradient(defenses.vaccine(loss_fn, RHO), adapter, frozen, batches)
    check_slopes(lambda adapter: compiled(adapter, held), adapter, grads)
    np.testing.assert_allclose(metrics["loss"], compiled(adapter, held), rtol=1e-12)
    np.testing.assert_allclose(metrics["activation_gradient_norm"], norm, rtol=1e-12)
    # The perturbation's own gradient, from finite differences at the sites.
    zeros = jax.tree.map(jnp.zeros_like, site_grads)
    direction = tiny.direction(zeros)
    found = tiny.slope(lambda e: compiled(adapter, e), (zeros,), (direction,), 1e-3)
    assert abs(tiny.dot(site_grads, direction) - found) < RELATIVE * abs(found)


def test_rho_0_is_sft():
    problem = *toy.trees(), toy.batches()
    expected, _, _ = gradient(defenses.sft(toy.loss_fn), *problem)
    assert differ(gradient(defenses.vaccine(toy.loss_fn, rho=0.0), *problem)[0], expected) < 1e-14
    all_layers = defenses.t_vaccine(toy.no_dropout, rho=0.0, layers=toy.L)
    assert differ(gradient(all_layers, *problem, jax.random.key(0))[0], expected) < 1e-14


def test_t_vaccine_on_all_layers_is_vaccine():
    problem = *toy.trees(), toy.batches(), jax.random.key(0)
    found, _, _ = gradient(defenses.t_vaccine(toy.no_dropout, RHO, layers=toy.L), *problem)
    assert differ(found, gradient(defenses.vaccine(toy.no_dropout, RHO), *problem)[0]) < 1e-14


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("lam, alpha", [(0.0, 0.1), (5.0, 0.0)])
def test_booster_without_its_regularizer_is_its_base(lam, alpha, exact):
    problem = *toy.trees(), toy.batches()
    for under in (defenses.sft(toy.loss_fn), defenses.vaccine(toy.loss_fn, RHO)):
        found, _, _ = gradient(defenses.booster(toy.loss_fn, lam, alpha, under, exact), *problem)
        assert differ(found, gradient(under, *problem)[0]) < 1e-13


def test_approximate_booster_tends_to_the_exact_one():
    """Both regularizers' gradients are alpha · H n + O(alpha²), n the normalised gradient and H the Hessian of h."""
    adapter, frozen = toy.trees()
    sft, _, _ = gradient(defenses.sft(toy.loss_fn), adapter, frozen, toy.batches())
    differences = []
    for alpha in (0.1, 0.01, 0.001):
        regularizers = [
            jax.tree.map(jnp.subtract, gradient(
                defenses.booster(toy.loss_fn, 1.0, alpha, exact=exact), adapter, frozen, toy.batches())[0], sft)
            for exact in (False, True)]
        differences.append(differ(*regularizers))
    assert 1e-3 < differences[0] < 1
    # Relative to regularizers of order alpha, so of first order in alpha.
    np.testing.assert_allclose(np.divide(differences[1:], differences[:-1]), 0.1, rtol=0.3)


def test_booster_from_its_equation():
    adapter, frozen = toy.trees()
    batches = toy.batches()
    f, h = (jax.grad(lambda w, name=name: toy.loss_fn(w, frozen, batches[name])[0]) for name in batches)
    norm = tiny.dot(h(adapter), h(adapter)) ** 0.5
    stepped = jax.tree.map(lambda w, g: w - ALPHA * g / (norm + 1e-7), adapter, h(adapter))
    expected = jax.tree.map(lambda f, h, p: f + LAM * (h - p), f(adapter), h(adapter), h(stepped))
    found, _, metrics = gradient(defenses.booster(toy.loss_fn, LAM, ALPHA), adapter, frozen, batches)
    assert differ(found, expected) < 1e-12
    np.testing.assert_allclose(metrics["harmful_gradient_norm"], norm, rtol=1e-12)
    assert metrics["perturbed_harmful_loss"] < metrics["harmful_loss"], "a step against the gradient goes down"


@pytest.mark.parametrize("freeze", ["layer", "released"])
def test_booster_freezes_what_its_base_freezes(freeze):
    """Norm, simulated step and gradient are those of what trains."""
    adapter, frozen = toy.trees()
    adapter, batches = toy.in_blocks(adapter), toy.batches()
    active = jnp.array([False, True, False, True])
    mlp = active if freeze == "layer" else jnp.array([False, True, True, True])
    under = defenses.sft(toy.blocks_no_dropout)

    def only_trained(tree):
        return {"layers": {"attention": {"a": tree["layers"]["attention"]["a"] * active[:, None, None]},
                           "mlp": {"b": tree["layers"]["mlp"]["b"] * mlp[:, None]}}}

    def masked(adapter, frozen, state, batches, key):
        grads, _, metrics = under.gradient(adapter, frozen, (), batches, key)
        return only_trained(grads), state, metrics

    freezing = defenses.Defense(
        lambda adapter: defenses.TVaccineState(jnp.zeros((), int), jnp.ones(toy.L), active), masked,
        defenses.t_vaccine(toy.blocks_loss, freeze=freeze, in_mlp=toy.in_mlp).trainable)

    def restricted_loss(part, frozen, batch, perturbations=None, key=None):
        whole = jax.tree.map(
            lambda p, w: p + jax.lax.stop_gradient(w), only_trained(part),
            jax.tree.map(jnp.subtract, adapter, only_trained(adapter)))
        return toy.blocks_loss(whole, frozen, batch)

    for exact in (False, True):
        boosted = defenses.booster(toy.blocks_loss, LAM, ALPHA, freezing, exact)
        assert boosted.trainable is freezing.trainable
        found, _, _ = gradient(boosted, adapter, frozen, batches)
        expected, _, _ = gradient(defenses.booster(restricted_loss, LAM, ALPHA, exact=exact), adapter, frozen, batches)
        assert differ(found, expected) < 1e-12


def test_a_vanishing_harmful_gradient_is_no_division_by_zero():
    def flat(adapter, frozen, batch, perturbations=None, key=None):
        loss, aux = toy.loss_fn(adapter, frozen, batch, perturbations, key)
        return loss * batch["weight"], aux

    adapter, frozen = toy.trees()
    batches = {"alignment": toy.batch() | {"weight": 1.0}, "harmful": toy.batch() | {"weight": 0.0}}
    expected, _, _ = gradient(defenses.sft(flat), adapter, frozen, batches)
    for exact in (False, True):
        found, _, _ = gradient(defenses.booster(flat, LAM, ALPHA, exact=exact), adapter, frozen, batches)
        assert differ(found, expected) < 1e-14
    for defense in (defenses.vaccine(flat, RHO), defenses.t_vaccine(flat, RHO, layers=2)):
        grads, state, _ = gradient(
            defense, adapter, frozen, dict.fromkeys(batches, batches["harmful"]), jax.random.key(0))
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(state.probabilities, 1 / toy.L)
