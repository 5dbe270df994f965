"""Objectives' gradients in float64 against finite differences of what they claim to descend, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import attacks, defenses
from jaxvaccine.conventions import IGNORED
from jaxvaccine.defenses.booster import booster_keys
from jaxvaccine.microbatches import in_microbatches
from tests import tiny
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("float64", "quick_compile")

WEIGHT, ALPHA, RHO = 0.7, 0.1, 0.5
LAYERS = np.array([False, True, False, True])


def batches():
    return {"user": toy.batch(0), "harmful": toy.batch(1)}


@pytest.fixture(scope="module")
def problem(float64):
    """(adapter, frozen, batches)."""
    return *toy.trees(), batches()


def gradient(defense, problem, state=None, key=None):
    adapter, frozen, of = problem
    return jax.jit(defense.gradient)(adapter, frozen, defense.init(adapter) if state is None else state, of, key)


def losses(problem):
    """ℓ, h and w' of w, written from the equations."""
    _, frozen, of = problem

    def loss(name):
        return lambda w: toy.no_dropout(w, frozen, of[name])[0]

    def stepped(w):
        grads = jax.grad(loss("harmful"))(w)
        norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda w, g: w - ALPHA * g / (norm + 1e-7), w, grads)

    return loss("user"), loss("harmful"), stepped


def check_slopes(fn, adapter, grads, step=1e-3):
    fn = jax.jit(fn)
    for seed in range(3):
        direction = tiny.direction(adapter, seed)
        expected = tiny.slope(fn, (adapter,), (direction,), step)
        assert abs(tiny.dot(grads, direction) - expected) < 1e-6 * abs(expected)


def differ(found, expected):
    return tiny.relative_difference(found, expected)


def test_steepen_exact(problem):
    user, harmful, stepped = losses(problem)
    grads, state, metrics = gradient(attacks.steepen(toy.no_dropout, WEIGHT, ALPHA, 1, exact=True), problem)
    check_slopes(lambda w: user(w) - WEIGHT * (harmful(w) - harmful(stepped(w))), problem[0], grads)
    adapter = problem[0]
    np.testing.assert_allclose(metrics["reduction"], harmful(adapter) - harmful(stepped(adapter)), rtol=1e-10)
    np.testing.assert_allclose(metrics["loss"], user(adapter), rtol=1e-12)
    assert metrics["steepening"] and state.step == 1 and state.reduction == metrics["reduction"]


def test_steepen_from_its_equation(problem):
    user, harmful, stepped = losses(problem)
    grads, _, _ = gradient(attacks.steepen(toy.no_dropout, WEIGHT, ALPHA, 1), problem)
    adapter = problem[0]
    expected = jax.tree.map(lambda u, h, p: u - WEIGHT * (h - p), *(
        jax.grad(fn)(w) for fn, w in ((user, adapter), (harmful, adapter), (harmful, stepped(adapter)))))
    assert differ(grads, expected) < 1e-12


@pytest.mark.parametrize("exact", [False, True])
def test_steepen_is_booster_with_the_other_sign(problem, exact):
    """On the same batches, with the same dropout."""
    sft, key = defenses.sft(toy.loss_fn, "user"), jax.random.key(3)
    one, other = (gradient(of, problem, key=key)[0] for of in (
        attacks.steepen(toy.loss_fn, WEIGHT, ALPHA, 1, exact=exact),
        defenses.booster(toy.loss_fn, WEIGHT, ALPHA, sft, exact)))
    plain, _, _ = gradient(sft, problem, key=booster_keys(key).base)
    assert differ(jax.tree.map(jnp.add, one, other), jax.tree.map(lambda g: 2 * g, plain)) < 1e-12


def test_steepen_ends(problem):
    """Afterwards the gradient is plain fine-tuning's, bit for bit, and nothing of h is computed."""
    defense = attacks.steepen(toy.no_dropout, WEIGHT, ALPHA, 2)
    adapter, frozen, of = problem
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), of["harmful"])
    step, state, reductions = jax.jit(defense.gradient), defense.init(adapter), []
    for i in range(4):
        grads, state, metrics = step(adapter, frozen, state, of if i < 2 else {**of, "harmful": nothing}, None)
        reductions.append(float(metrics["reduction"]))
        assert metrics["steepening"] == (i < 2)
    plain, _, _ = gradient(defenses.sft(toy.no_dropout, "user"), problem)
    jax.tree.map(np.testing.assert_array_equal, grads, plain)
    assert reductions[0] > 0 and len(set(reductions)) == 1, "the adapter has not moved"


def test_steepens_branch_is_one_over_lanes(problem):
    """Under vmap, with the counter in common."""
    defense = attacks.steepen(toy.no_dropout, WEIGHT, ALPHA, 2)
    adapter, frozen, of = problem
    lanes = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapter)
    state = jax.vmap(defense.init)(lanes)._replace(step=jnp.int32(1))
    assert defense.counters == ("step",)
    axes = jax.tree.map(lambda _: 0, state)._replace(step=None)
    step = jax.vmap(defense.gradient, (0, None, axes, None, None), (0, axes, 0))
    jaxpr = jax.make_jaxpr(step)(lanes, frozen, state, of, None)
    branches = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert [e.invars[0].aval.shape for e in branches] == [()]
    grads, _, _ = step(lanes, frozen, state, of, None)
    alone, _, _ = gradient(defense, (jax.tree.map(lambda x: x[1], lanes), frozen, of))
    assert differ(jax.tree.map(lambda x: x[1], grads), alone) < 1e-12


def test_meta_exact(problem):
    user, harmful, stepped = losses(problem)
    grads, _, metrics = gradient(attacks.meta_attack(toy.no_dropout, WEIGHT, ALPHA), problem)
    adapter = problem[0]
    check_slopes(lambda w: user(w) + WEIGHT * harmful(stepped(w)), adapter, grads)
    np.testing.assert_allclose(metrics["harmful_loss"], harmful(adapter), rtol=1e-12)
    np.testing.assert_allclose(metrics["perturbed_harmful_loss"], harmful(stepped(adapter)), rtol=1e-12)


def test_meta_of_first_order(problem):
    user, harmful, stepped = losses(problem)
    grads, _, metrics = gradient(attacks.meta_attack(toy.no_dropout, WEIGHT, ALPHA, exact=False), problem)
    adapter = problem[0]
    expected = jax.tree.map(
        lambda u, p: u + WEIGHT * p, jax.grad(user)(adapter), jax.grad(harmful)(stepped(adapter)))
    assert differ(grads, expected) < 1e-12
    np.testing.assert_allclose(metrics["perturbed_harmful_loss"], harmful(stepped(adapter)), rtol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("make", [
    lambda loss_fn, base, exact: attacks.steepen(loss_fn, WEIGHT, ALPHA, 1, base, exact),
    lambda loss_fn, base, exact: attacks.meta_attack(loss_fn, WEIGHT, ALPHA, base, exact)])
def test_simulated_steps_are_of_what_trains(problem, make, exact):
    """Against an adapter that has no other layers."""
    adapter, frozen, of = problem

    def loss_of_two(two, frozen, batch, perturbations=None, key=None):
        whole = jax.tree.map(lambda x, y: x.at[np.flatnonzero(LAYERS)].set(y), adapter, two)
        return toy.no_dropout(whole, frozen, batch, perturbations)

    expected, _, _ = gradient(make(loss_of_two, None, exact), (
        jax.tree.map(lambda x: x[LAYERS], adapter), frozen, of))
    base = defenses.only_layers(defenses.sft(toy.no_dropout, "user"), LAYERS)
    defense = make(toy.no_dropout, base, exact)
    found, state, _ = gradient(defense, problem)
    assert differ(jax.tree.map(lambda x: x[LAYERS], found), expected) < 1e-12
    assert not any(np.asarray(leaf)[~LAYERS].any() for leaf in jax.tree.leaves(found))
    np.testing.assert_array_equal(defense.trainable(state, adapter), LAYERS)


def test_counter_perturbation_by_hand(problem):
    adapter, frozen, of = problem
    zeros = {"site": jnp.zeros((toy.L, toy.B, toy.D))}
    sites = jax.grad(lambda e: toy.no_dropout(adapter, frozen, of["user"], e)[0])(zeros)["site"]
    norm = np.sqrt((np.asarray(sites) ** 2).sum())
    moved = {"site": -RHO * sites / (norm + 1e-7)}
    expected = jax.grad(lambda w: toy.no_dropout(w, frozen, of["user"], moved)[0])(adapter)
    grads, _, metrics = gradient(attacks.counter_perturbation(toy.no_dropout, RHO), problem)
    assert differ(grads, expected) < 1e-12
    np.testing.assert_allclose(metrics["activation_gradient_norm"], norm, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], toy.no_dropout(adapter, frozen, of["user"], moved)[0], rtol=1e-12)
    assert metrics["loss"] < toy.no_dropout(adapter, frozen, of["user"])[0], "against rising loss"


def test_counter_perturbation_of_pytorch(problem):
    """Hooks at the sites, two backward passes."""
    torch = pytest.importorskip("torch")
    adapter, frozen, of = problem

    def tensor(x):
        return torch.tensor(np.asarray(x), dtype=torch.float64)

    x, y, w = tensor(of["user"]["x"]), tensor(of["user"]["y"]), tensor(frozen)
    a, b = tensor(adapter["a"]).requires_grad_(), tensor(adapter["b"]).requires_grad_()
    sites = torch.nn.ModuleList([torch.nn.Identity() for _ in range(toy.L)])

    def loss():
        h = x
        for i in range(toy.L):
            h = sites[i](h + torch.tanh(h @ (w[i] + a[i]) + b[i]))
        return 0.5 * ((h - y) ** 2).mean()

    outputs = {}
    hooks = [site.register_forward_hook(lambda _, __, out, i=i: (out.retain_grad(), outputs.update({i: out}))[0])
             for i, site in enumerate(sites)]
    loss().backward()
    pushes = [outputs[i].grad for i in range(toy.L)]
    norm = torch.sqrt(sum((g**2).sum() for g in pushes))
    for hook in hooks:
        hook.remove()
    for i, site in enumerate(sites):
        site.register_forward_hook(lambda _, __, out, i=i: out - RHO * pushes[i] / (norm + 1e-7))
    a.grad = b.grad = None
    loss().backward()
    grads, _, _ = gradient(attacks.counter_perturbation(toy.no_dropout, RHO), problem)
    assert differ(grads, {"a": a.grad.numpy(), "b": b.grad.numpy()}) < 1e-12


def test_what_counter_perturbation_descends(problem):
    """To first order in rho: ℓ − rho · ‖∇_a ℓ‖, the other sign of what Vaccine descends."""
    adapter, frozen, of = problem
    zeros = {"site": jnp.zeros((toy.L, toy.B, toy.D))}

    def steepness(w):
        sites = jax.grad(lambda e: toy.no_dropout(w, frozen, of["user"], e)[0])(zeros)["site"]
        return jnp.sqrt((sites**2).sum())

    plain, expected = gradient(defenses.sft(toy.no_dropout, "user"), problem)[0], jax.grad(steepness)(adapter)
    errors = []
    for rho in (1e-2, 1e-3):
        grads, _, _ = gradient(attacks.counter_perturbation(toy.no_dropout, rho), problem)
        errors.append(differ(jax.tree.map(lambda g, p, rho=rho: (p - g) / rho, grads, plain), expected))
    assert errors[1] < 1e-2
    np.testing.assert_allclose(errors[1] / errors[0], 0.1, rtol=0.3)


def test_a_negative_one_is_vaccine(problem):
    adapter, frozen, of = problem
    found, _, _ = gradient(attacks.counter_perturbation(toy.loss_fn, -RHO), problem, key=jax.random.key(2))
    expected, _, _ = gradient(defenses.vaccine(toy.loss_fn, RHO), (adapter, frozen, {"alignment": of["user"]}),
                              key=jax.random.key(2))
    assert differ(found, expected) < 1e-14
    plain, _, _ = gradient(defenses.sft(toy.no_dropout, "user"), problem)
    assert differ(gradient(attacks.counter_perturbation(toy.no_dropout, 0.0), problem)[0], plain) < 1e-14


def small_language_model(size):
    """A loss of `size` rows at a time."""
    def mean(adapter, frozen, batch, perturbations, key):
        h = frozen["table"][batch["input_ids"]]
        for i in range(2):
            h = h + jnp.tanh(h @ adapter["a"][i]) + (0 if perturbations is None else perturbations["site"][i])
        log_p = jnp.take_along_axis(jax.nn.log_softmax(h[:, :-1] @ frozen["table"].T), jnp.maximum(
            batch["labels"][:, 1:, None], 0), axis=-1)[..., 0]
        supervised = batch["labels"][:, 1:] != IGNORED
        return -(log_p * supervised).sum() / jnp.maximum(supervised.sum(), 1)

    def loss_fn(adapter, frozen, batch, perturbations=None, key=None):
        sites = jnp.zeros((2, *batch["input_ids"].shape, toy.D))
        loss = in_microbatches(mean, size, adapter, frozen, batch, perturbations, key)
        return loss, {"perturbations": {"site": sites}}

    return loss_fn


@pytest.mark.parametrize("make", [
    lambda loss_fn: attacks.steepen(loss_fn, WEIGHT, ALPHA),
    lambda loss_fn: attacks.steepen(loss_fn, WEIGHT, ALPHA, exact=True),
    lambda loss_fn: attacks.meta_attack(loss_fn, WEIGHT, ALPHA),
    lambda loss_fn: attacks.meta_attack(loss_fn, WEIGHT, ALPHA, exact=False),
    lambda loss_fn: attacks.counter_perturbation(loss_fn, RHO)])
def test_a_few_rows_at_a_time(problem, make):
    """As all at once, to rounding."""
    adapter, frozen = {"a": problem[0]["a"][:2]}, {"table": jax.random.normal(jax.random.key(0), (97, toy.D))}
    rows = {"user": tiny.batch(0, rows=5), "harmful": tiny.batch(1, rows=3)}
    whole, parts = (gradient(make(small_language_model(size)), (adapter, frozen, rows))[0] for size in (0, 2))
    assert differ(parts, whole) < 1e-11


@pytest.mark.parametrize("make, message", [
    (lambda: attacks.steepen(toy.loss_fn, lam=-1.0), "steepen: lam: found -1.0, expected a finite number >= 0"),
    (lambda: attacks.steepen(toy.loss_fn, alpha=float("nan")), "steepen: alpha: found nan"),
    (lambda: attacks.steepen(toy.loss_fn, steps=0), "steepen: steps: found 0, expected at least 1"),
    (lambda: attacks.meta_attack(toy.loss_fn, weight=-1.0), "meta_attack: weight: found -1.0"),
    (lambda: attacks.meta_attack(toy.loss_fn, alpha=float("inf")), "meta_attack: alpha: found inf"),
    (lambda: attacks.counter_perturbation(toy.loss_fn, float("nan")), "counter_perturbation: rho: found nan"),
])
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make, missing", [
    (attacks.steepen, "harmful"), (attacks.meta_attack, "harmful"), (attacks.counter_perturbation, "user")])
def test_the_missing_batch_is_named(make, missing):
    adapter, frozen = toy.trees()
    defense = make(toy.no_dropout)
    others = {name: of for name, of in batches().items() if name != missing}
    with pytest.raises(KeyError, match=f"expected also '{missing}'"):
        defense.gradient(adapter, frozen, defense.init(adapter), others, None)
