"""Lisa's schedule on a toy; its gradients are checked in parity."""

import jax
import numpy as np
import pytest

from jaxvaccine import defenses, optim, training
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")


def batches(step):
    return {"alignment": toy.batch(step), "user": toy.batch(1000 + step)}


def train(defense, steps):
    """[(adapter before the step, its metrics)] under plain gradient descent, and how often the step was compiled."""
    adapter, frozen = toy.trees()
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(0.05, weight_decay=0.0, clip_norm=0.0), steps)
    step_fn = training.make_train_step(defense, optimizer)
    state, out = training.init_train_state(adapter, defense, optimizer), []
    for step in range(steps):
        before = jax.device_get(state.adapter)
        state, metrics = step_fn(state, frozen, batches(step), jax.random.key(0))
        out.append((before, jax.device_get(metrics)))
    return out, step_fn._cache_size()


def test_phases_and_what_they_are_held_to():
    steps, compiled = train(defenses.lisa(toy.no_dropout, 2, 3, rho=0.5), 11)
    assert [bool(metrics["aligning"]) for _, metrics in steps] == [True, True, False, False, False] * 2 + [True]
    assert compiled == 1
    frozen = toy.trees()[1]
    for i, (adapter, metrics) in enumerate(steps):
        name = "alignment" if metrics["aligning"] else "user"
        np.testing.assert_allclose(metrics["loss"], toy.no_dropout(adapter, frozen, batches(i)[name])[0], rtol=1e-6)
        switch = max(s for s in (0, 2, 5, 7, 10) if s <= i)
        distance = np.sqrt(sum(((adapter[k] - steps[switch][0][k]) ** 2).sum() for k in adapter))
        np.testing.assert_allclose(metrics["switch_distance"], distance, rtol=1e-5)
    assert all(metrics["switch_distance"] == 0 for i, (_, metrics) in enumerate(steps) if i in (0, 2, 5, 7, 10))


@pytest.mark.parametrize("start, acts", [(0.0, [False, True, True]), (1.0, [False, False, True]),
                                         (1.5, [False, False, True])])
def test_when_the_proximal_term_starts(start, acts):
    """After the steps up to `start`; what differs from Lisa without it shows that it acts."""
    adapter, frozen = toy.trees()
    moved = jax.tree.map(lambda x: x + 1, adapter)
    defense, plain = defenses.lisa(toy.no_dropout, 9, 1, 2.0, start), defenses.sft(toy.no_dropout)
    state, gradient = defense.init(adapter), jax.jit(defense.gradient)
    for step in range(3):
        # Away from where the phase began, but for the first step, which is a switch.
        grads, state, _ = gradient(moved if step else adapter, frozen, state, batches(step), None)
        expected, _, _ = plain.gradient(moved if step else adapter, frozen, (), batches(step), None)
        pull = grads["b"] - expected["b"]
        np.testing.assert_allclose(pull, np.full(pull.shape, 2.0 if acts[step] else 0.0), atol=1e-5)


def test_the_gradient_at_a_switch_is_the_losss():
    adapter, frozen = toy.trees()
    defense = defenses.lisa(toy.no_dropout, 1, 1, rho=1e6, start=0)
    state = defense.init(adapter)._replace(step=jax.numpy.int32(4))
    grads, _, metrics = defense.gradient(adapter, frozen, state, batches(0), None)
    expected = jax.grad(lambda w: toy.no_dropout(w, frozen, batches(0)["alignment"])[0])(adapter)
    for name in grads:
        np.testing.assert_array_equal(grads[name], expected[name])
    assert np.isfinite(metrics["switch_distance"])


@pytest.mark.parametrize("arguments, message", [
    ({"alignment_steps": 0}, "lisa: alignment_steps: found 0, expected at least 1"),
    ({"user_steps": -1}, "lisa: user_steps: found -1, expected at least 1"),
    ({"rho": float("nan")}, "lisa: rho: found nan, expected a finite number >= 0"),
    ({"start": -1.0}, r"lisa: start: found -1.0, expected a finite number >= 0")])
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        defenses.lisa(toy.loss_fn, **arguments)


def test_batches_are_checked():
    adapter, frozen = toy.trees()
    defense = defenses.lisa(toy.loss_fn)
    with pytest.raises(KeyError, match=r"lisa: batches: found \['alignment'\], expected also 'user'"):
        defense.gradient(adapter, frozen, defense.init(adapter), {"alignment": toy.batch()}, None)
    short = jax.tree.map(lambda x: x[:1], toy.batch())
    with pytest.raises(ValueError, match=r"lisa: batches: found shapes .*\(1, 5\).* in 'user', expected .*\(3, 5\)"):
        defense.gradient(adapter, frozen, defense.init(adapter), {"alignment": toy.batch(), "user": short}, None)
