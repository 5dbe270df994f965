"""What Vaccine's first pass costs, and what it asks of a loss."""

import functools

import jax
import numpy as np
import pytest

from jaxvaccine import defenses, losses
from jaxvaccine.defenses.vaccine import activation_gradient
from tests import jaxprs, tiny
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def language_model():
    """Sizes that are all different, so that a shape says what it is of."""
    model = tiny.model(rank=3, dropout=0.1, remat="none")
    return losses.causal_lm_loss(model), *tiny.trees(model), tiny.batch(rows=5, length=20)


def adapter_shaped(equations, adapter):
    """Matrix products whose result has the shape of one of the adapter's matrices, of one layer or of all."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(adapter)}
    shapes |= {shape[1:] for shape in shapes} | {shape[:0:-1] for shape in shapes}
    return [e for e in equations if e.primitive.name == "dot_general" and e.outvars[0].aval.shape in shapes]


def test_the_first_pass_computes_no_weight_gradient(language_model):
    loss_fn, adapter, frozen, batch = language_model
    first = functools.partial(activation_gradient, loss_fn)
    assert not adapter_shaped(jaxprs.live_equations(first, adapter, frozen, batch, KEY), adapter)
    whole = jax.grad(lambda *a: loss_fn(*a, None, KEY)[0])
    seen = adapter_shaped(jaxprs.live_equations(whole, adapter, frozen, batch), adapter)
    assert len(seen) >= len(jax.tree.leaves(adapter)), "the check does not see weight gradients"


def test_the_first_pass_costs_less(language_model):
    loss_fn, adapter, frozen, batch = language_model

    def flops(fn):
        return jax.jit(fn).lower(adapter, frozen, batch).compile().cost_analysis()["flops"]

    first = flops(lambda *a: activation_gradient(loss_fn, *a, None))
    assert first < 0.95 * flops(lambda *a: jax.value_and_grad(loss_fn, has_aux=True)(*a))


def test_the_first_pass_perturbs_every_layer(language_model):
    loss_fn, adapter, frozen, batch = language_model
    _, shapes = jax.eval_shape(functools.partial(activation_gradient, loss_fn), adapter, frozen, batch, KEY)
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [(4, 5, 20, 32)]


def test_a_loss_without_sites_is_refused():
    def bare(adapter, frozen, batch, perturbations=None, key=None):
        return toy.loss_fn(adapter, frozen, batch)[0], {"tokens": 1}

    adapter, frozen = toy.trees()
    for defense in (defenses.vaccine(bare), defenses.t_vaccine(bare, layers=2)):
        with pytest.raises(ValueError, match="loss_fn: aux has no 'perturbations'"):
            defense.gradient(adapter, frozen, defense.init(adapter), toy.batches(), KEY)
    toy.run(defenses.booster(bare), 1)


def test_a_loss_that_needs_a_key():
    def keyed(adapter, frozen, batch, perturbations=None, key=None):
        assert key is not None
        return toy.loss_fn(adapter, frozen, batch, perturbations, key)

    toy.run(defenses.vaccine(keyed), 1)


@pytest.mark.parametrize("rho", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("defense", [defenses.vaccine, defenses.t_vaccine])
def test_rho_is_checked(defense, rho):
    with pytest.raises(ValueError, match=f"{defense.__name__}: rho: found {rho}, expected a finite number >= 0"):
        defense(toy.loss_fn, rho=rho)


@pytest.mark.parametrize("make", [
    functools.partial(defenses.vaccine, rho=1.5), functools.partial(defenses.t_vaccine, rho=1.5, layers=2)])
def test_gaussian_perturbations(make):
    """The gradient at noise of norm rho in the active layers, Gaussian, of another key in every step."""
    seen = []

    def spied(adapter, frozen, batch, perturbations=None, key=None):
        loss, aux = toy.no_dropout(adapter, frozen, batch, perturbations)
        if perturbations is not None:
            jax.debug.callback(lambda e: seen.append(np.asarray(e)), perturbations["site"])
        return loss, aux

    out = toy.run(make(spied, direction="gaussian", **({"importance": "uniform"} if make.func is defenses.t_vaccine
                                                       else {})), 40)
    jax.effects_barrier()
    adapter, frozen = toy.trees()
    gradient = jax.jit(jax.grad(lambda *a: toy.no_dropout(*a)[0]))
    assert len(seen) == len(out)
    for step, ((grads, state, metrics), e) in enumerate(zip(out, seen, strict=True)):
        active = np.asarray(getattr(state, "active_layers", np.ones(toy.L, bool)))
        np.testing.assert_allclose(np.linalg.norm(e), 1.5, rtol=1e-5)
        assert (e[~active] == 0).all() and (e[active] != 0).all()
        expected = gradient(adapter, frozen, toy.batches(step)["alignment"], {"site": e})
        for name in grads:
            np.testing.assert_allclose(grads[name][active], expected[name][active], rtol=1e-4, atol=1e-6)
        assert "activation_gradient_norm" not in metrics
    # Standardised, the entries of all steps are those of a normal distribution: their mean, variance and kurtosis.
    entries = np.concatenate([e[e != 0] / e[e != 0].std() for e in seen])
    assert abs(entries.mean()) < 0.1 and abs((entries**4).mean() - 3) < 0.5
    assert not np.allclose(seen[0], seen[1])


def test_gaussian_perturbations_need_a_key():
    defense = defenses.vaccine(toy.loss_fn, direction="gaussian")
    adapter, frozen = toy.trees()
    with pytest.raises(ValueError, match="direction='gaussian': key: found None"):
        defense.gradient(adapter, frozen, (), toy.batches(), None)


@pytest.mark.parametrize("defense", [defenses.vaccine, defenses.t_vaccine])
def test_direction_is_checked(defense):
    with pytest.raises(ValueError, match=f"{defense.__name__}: direction: found 'up', expected gradient or gaussian"):
        defense(toy.loss_fn, direction="up")


@pytest.mark.parametrize("make", [defenses.sft, defenses.vaccine])
def test_the_alignment_batch_is_named_if_missing(make):
    adapter, frozen = toy.trees()
    defense = make(toy.loss_fn)
    with pytest.raises(KeyError, match=rf"{make.__name__}: batches: found \['harmful'\], expected also 'alignment'"):
        defense.gradient(adapter, frozen, defense.init(adapter), {"harmful": toy.batch()}, None)


DROPPING = {
    "sft": lambda: defenses.sft(toy.loss_fn),
    "vaccine": lambda: defenses.vaccine(toy.loss_fn),
    "t_vaccine": lambda: defenses.t_vaccine(toy.loss_fn, layers=toy.L),
    "booster": lambda: defenses.booster(toy.loss_fn),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_follows_the_key(name):
    adapter, frozen = toy.trees()
    defense = DROPPING[name]()
    gradient = jax.jit(defense.gradient)

    def at(seed):
        return gradient(adapter, frozen, defense.init(adapter), toy.batches(), jax.random.key(seed))[0]

    jax.tree.map(np.testing.assert_array_equal, at(0), at(0))
    assert tiny.relative_difference(at(1), at(0)) > 0.01


@pytest.mark.parametrize("name, passes", [("sft", 1), ("vaccine", 2), ("t_vaccine", 3), ("booster", 3)])
def test_every_pass_drops_something_else(name, passes):
    keys = []

    def remember(adapter, frozen, batch, perturbations=None, key=None):
        jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key))
        return toy.loss_fn(adapter, frozen, batch, perturbations, key)

    make = {"sft": defenses.sft, "vaccine": defenses.vaccine, "booster": defenses.booster,
            "t_vaccine": lambda loss_fn: defenses.t_vaccine(loss_fn, layers=2)}[name]
    toy.run(make(remember), 1)
    jax.effects_barrier()
    assert len(set(keys)) == passes
