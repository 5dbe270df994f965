"""The optimizer without PyTorch: what freezing leaves alone, and Optax's own AdamW. See also parity/test_optim.py."""

import dataclasses
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvaccine import optim

pytestmark = pytest.mark.usefixtures("quick_compile")

L = 4
CONFIG = optim.OptimizerConfig(1e-2, "constant", weight_decay=0.1, clip_norm=1.0)


def tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
                        {"a": (L, 3, 2), "b": (L, 2, 5), "bias": (L,)}, is_leaf=lambda x: isinstance(x, tuple))


def train(optimizer, steps, masks=None, params=None):
    """[(params, state)] after each step, gradients of seed 1, 2, …; `masks` one for each step."""
    params = tree(0) if params is None else params
    state, out = optimizer.init(params), []

    @jax.jit
    def step(grads, state, params, mask):
        extra = {} if masks is None else {"trainable": mask}
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(tree(i + 1), state, params, None if masks is None else masks[i])
        out.append((params, state))
    return out


def layers(tree):
    """The leaves that have a layer axis."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if np.ndim(leaf)]


def of_leaf(name, params, state):
    """A leaf and its moments and count."""
    return layers((params[name], state[1][name]))


def random_masks(steps, names):
    """For each step {name: [L] bool}."""
    drawn = np.random.default_rng(0).random((steps, len(names), L)) < 0.5
    return [dict(zip(names, masks, strict=True)) for masks in drawn]


@pytest.mark.parametrize("per_leaf", [False, True])
def test_what_is_frozen_does_not_move_bit_for_bit(per_leaf):
    if per_leaf:
        given = masks = random_masks(20, ["a", "b", "bias"])
    else:
        given = [step["all"] for step in random_masks(20, ["all"])]
        masks = [dict.fromkeys(["a", "b", "bias"], mask) for mask in given]
    before = (tree(0), optim.layer_masked_adamw(CONFIG, 20).init(tree(0)))
    moved = 0
    for step, after in enumerate(train(optim.layer_masked_adamw(CONFIG, 20), 20, given)):
        for name, mask in masks[step].items():
            for old, new in zip(of_leaf(name, *before), of_leaf(name, *after), strict=True):
                np.testing.assert_array_equal(old[~mask].view(np.int32), new[~mask].view(np.int32))
                moved += mask.any() and (old[mask] != new[mask]).all()
        before = after
    assert moved > 200
    for name in masks[0]:
        count = of_leaf(name, *after)[1]
        np.testing.assert_array_equal(count, np.sum([step[name] for step in masks], axis=0))


@pytest.mark.parametrize("kind", [kind for kind in get_args(optim.Kind) if kind != "adamw"])
def test_what_is_frozen_does_not_move_whatever_the_optimizer(kind):
    optimizer = optim.layer_masked_optimizer(dataclasses.replace(CONFIG, kind=kind), 6)
    masks, before = random_masks(6, ["a", "b", "bias"]), (tree(0), optimizer.init(tree(0)))
    for mask, after in zip(masks, train(optimizer, 6, masks), strict=True):
        for name, of in mask.items():
            for old, new in zip(of_leaf(name, *before), of_leaf(name, *after), strict=True):
                np.testing.assert_array_equal(old[~of].view(np.int32), new[~of].view(np.int32))
            assert (before[0][name][of] != after[0][name][of]).all()
        before = after


def newton_schulz(x):
    """Jordan's quintic iteration of the matrix, in its own orientation."""
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_from_its_equations():
    """In float64, with NumPy: each layer's matrix by itself, in its own count of steps; vectors by Adam."""
    config = optim.OptimizerConfig(0.1, weight_decay=0.2, clip_norm=0.0, kind="muon")
    beta, masks = 0.95, np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]], bool)
    with jax.enable_x64(True):
        start = jax.tree.map(lambda x: x.astype(jnp.float64), tree(0))
        optimizer = optim.layer_masked_optimizer(config, 4)
        state, found = optimizer.init(start), start
        update = jax.jit(optimizer.update)
        for step, mask in enumerate(masks):
            grads = jax.tree.map(lambda x: x.astype(jnp.float64), tree(step + 1))
            updates, state = update(grads, state, found, trainable=mask)
            found = optax.apply_updates(found, updates)
        vectors = train(optim.layer_masked_adamw(dataclasses.replace(config, kind="adamw"), 4), 4, masks)[-1][0]
    for name, layer in itertools.product("ab", range(L)):
        w, m, t = np.float64(start[name][layer]), 0.0, 0
        for step in np.flatnonzero(masks[:, layer]):
            g = np.float64(tree(int(step) + 1)[name][layer])
            m, t = beta * m + (1 - beta) * g, t + 1
            direction = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            rows, columns = w.shape
            turned = newton_schulz(direction.T).T if rows > columns else newton_schulz(direction)
            w = w - 0.1 * (np.sqrt(max(1, columns / rows)) * turned + 0.2 * w)
        np.testing.assert_allclose(found[name][layer], w, rtol=1e-9)
    np.testing.assert_allclose(found["bias"], vectors["bias"], rtol=1e-5)


@pytest.mark.parametrize("trained", [np.arange(L) < 9, np.arange(L) == 2])
def test_a_normalised_step_is_of_the_learning_rates_length(trained):
    """Over all that trains; the training step gives zeros for the rest."""
    config = optim.OptimizerConfig(0.3, weight_decay=0.0, clip_norm=1e-3, kind="normalised_sgd")
    optimizer = optim.layer_masked_optimizer(config, 1)
    grads = jax.tree.map(lambda g: 1e4 * g * trained.reshape(-1, *[1] * (g.ndim - 1)), tree(1))
    updates, _ = optimizer.update(grads, optimizer.init(tree(0)), tree(0), trainable=trained)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.3, rtol=1e-6)
    # As Booster's simulated step: −alpha ∇h / ‖∇h‖.
    np.testing.assert_allclose(updates["a"], -0.3 * grads["a"] / optax.tree.norm(grads), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("change", [{}, {"weight_decay": 0.0, "clip_norm": 0.0}])
def test_traced_numbers_are_the_schedules_bit_for_bit(optimized, schedule, change):
    config = dataclasses.replace(CONFIG, learning_rate=3e-3, schedule=schedule, warmup_ratio=0.3, **change)
    held, numbers = optim.layer_masked_optimizer(config, 9), optim.scalars(config, 9)
    assert numbers.learning_rate.dtype == np.float32

    @jax.jit
    def with_schedule(grads, state, params):
        updates, state = held.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def with_numbers(grads, state, params, of):
        updates, state = optim.layer_masked_step("adamw", of).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected, of_expected = tree(0), held.init(tree(0))
    found, of_found = tree(0), optim.layer_masked_step("adamw", optim.Scalars(0.0)).init(tree(0))
    for step in range(9):
        expected, of_expected = with_schedule(tree(step), of_expected, expected)
        found, of_found = with_numbers(
            tree(step), of_found, found, numbers._replace(learning_rate=numbers.learning_rate[step]))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_adamw_is_the_papers_alone():
    with pytest.raises(ValueError, match="layer_masked_adamw: kind: found 'sgd', expected adamw"):
        optim.layer_masked_adamw(dataclasses.replace(CONFIG, kind="sgd"), 1)


def select_by_hand(inner):
    """What `layer_masked` does, as one select after an update of everything."""
    def update(updates, state, params, trainable):
        new_updates, new_state = zip(*(jax.vmap(inner.update)(updates[name], state[name], params[name])
                                       for name in updates), strict=True)

        def select(name, new, old):
            return jax.tree.map(lambda n, o: jnp.where(
                trainable[name].reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)

        zeros = jax.tree.map(jnp.zeros_like, updates)
        return tuple({name: select(name, n, old[name]) for name, n in zip(updates, new, strict=True)}
                     for new, old in ((new_updates, zeros), (new_state, state)))
    return update


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_a_select_bit_for_bit(dtype):
    """Optax's conditional mask on every layer; frozen layers' gradients may be anything, NaN too."""
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: x.astype(dtype), tree(0))
        inner = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
        masked = optim.layer_masked(inner)
        by_hand, update, state = jax.jit(select_by_hand(inner)), jax.jit(masked.update), masked.init(params)
        for step, masks in enumerate(random_masks(8, ["a", "b", "bias"])):
            grads = {name: jnp.where(masks[name].reshape(-1, *[1] * (g.ndim - 1)), g, jnp.nan).astype(dtype)
                     for name, g in tree(step + 1).items()}
            expected = by_hand(grads, state, params, masks)
            updates, state = update(grads, state, params, trainable=masks)
            assert jax.tree.structure((updates, state)) == jax.tree.structure(expected)
            for found, wanted in zip(jax.tree.leaves((updates, state)), jax.tree.leaves(expected), strict=True):
                assert found.dtype == wanted.dtype and np.isfinite(found).all()
                np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(wanted).view(np.uint8))
            assert updates["a"].dtype == dtype
            params = optax.apply_updates(params, updates)


def test_a_mask_may_cover_a_subtree():
    params = {"x": {"a": tree(0)["a"], "b": tree(0)["b"]}, "y": tree(0)["bias"]}
    optimizer = optim.layer_masked_adamw(CONFIG, 3)
    state, first, second = optimizer.init(params), np.arange(L) < 1, np.arange(L) > 1
    update = jax.jit(optimizer.update)
    found, of_found = update(params, state, params, trainable={"x": first, "y": second})
    expected, of_expected = update(
        params, state, params, trainable={"x": {"a": first, "b": first}, "y": second})
    jax.tree.map(np.testing.assert_array_equal, (found, of_found), (expected, of_expected))
    np.testing.assert_array_equal(found["y"] != 0, second)
    np.testing.assert_array_equal(found["x"]["a"].any(axis=(1, 2)), first)


def test_a_layer_that_comes_back_continues_with_its_own_count():
    """Its steps are those of a layer that was never frozen and saw only the gradients of its own steps."""
    config = dataclasses.replace(CONFIG, clip_norm=0.0)
    masks = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]], bool)
    out = train(optim.layer_masked_adamw(config, 5), 5, masks)
    adamw = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    for layer in range(L):
        params = jax.tree.map(lambda x, i=layer: x[i], tree(0))
        state = adamw.init(params)
        for step in np.flatnonzero(masks[:, layer]):
            grads = jax.tree.map(lambda x, i=layer: x[i], tree(step + 1))
            updates, state = adamw.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        jax.tree.map(lambda f, e, i=layer: np.testing.assert_allclose(f[i], e, rtol=1e-5), out[-1][0], params)
    counts = [leaf for leaf in layers(out[-1][1]) if leaf.dtype == np.int32]
    np.testing.assert_array_equal(counts, [masks.sum(axis=0)] * 3)


def test_unmasked_it_is_adamw():
    """None, a mask of all layers, and Optax's clip and AdamW; Optax divides by the norm, PyTorch by 1e-6 more."""
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(CONFIG.learning_rate, weight_decay=CONFIG.weight_decay))
    ours = optim.layer_masked_adamw(CONFIG, 20)
    expected = train(reference, 20)[-1][0]
    for masks in (None, np.ones((20, L), bool)):
        found = train(ours, 20, masks)[-1][0]
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=2e-5, atol=1e-6), found, expected)


def test_no_clipping():
    grads = jax.tree.map(lambda x: 100 * x, tree(1))
    found, _ = optim.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    np.testing.assert_allclose(optax.tree.norm(found), 1, rtol=1e-5)
    without = optim.layer_masked_adamw(dataclasses.replace(CONFIG, clip_norm=0.0), 1)
    _, state = without.update(grads, without.init(tree(0)), tree(0))
    first_moment = max(layers(state), key=lambda leaf: np.abs(leaf).max() if leaf.dtype == np.float32 else 0)
    assert np.abs(first_moment).max() > 1


def test_new_masks_do_not_retrace():
    optimizer, traces = optim.layer_masked_adamw(CONFIG, 10), []

    @jax.jit
    def step(grads, state, params, mask):
        traces.append(1)
        return optimizer.update(grads, state, params, trainable=mask)

    state = optimizer.init(tree(0))
    for i in range(L):
        _, state = step(tree(1), state, tree(0), np.arange(L) == i)
    assert len(traces) == 1
    for masks in random_masks(4, ["a", "b", "bias"]):
        _, state = step(tree(1), state, tree(0), masks)
    assert len(traces) == 2


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_counts_global_steps(schedule):
    """A frozen layer does not hold the schedule up, and weight decay follows it."""
    config = optim.OptimizerConfig(0.5, schedule, warmup_ratio=0.25, weight_decay=0.1, clip_norm=0.0)
    rates = [float(optim.learning_rate_schedule(config, 8)(step)) for step in range(8)]
    masks = np.ones((8, L), bool)
    masks[:6, 1] = False
    out = train(optim.layer_masked_adamw(config, 8), 8, masks)
    # Zero gradients would make the decay alone visible; here the first step of layer 1 is sign(g) + decay.
    before, after = out[5][0]["a"][1], out[6][0]["a"][1]
    expected = before - rates[6] * (np.sign(tree(7)["a"][1]) + 0.1 * before)
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert rates[0] == 0 and abs(max(rates) - 0.5) < 1e-6


@pytest.mark.parametrize("change, message", [
    ({"schedule": "step"}, "schedule: found 'step', expected constant, linear or cosine"),
    ({"warmup_ratio": 1.1}, "warmup_ratio: found 1.1, expected 0 to 1"),
    ({"warmup_ratio": float("nan")}, "warmup_ratio: found nan, expected 0 to 1"),
    ({"learning_rate": -1.0}, "learning_rate: found -1.0, expected a finite number >= 0"),
    ({"learning_rate": float("nan")}, "learning_rate: found nan"),
    ({"weight_decay": float("inf")}, "weight_decay: found inf"),
    ({"clip_norm": -0.5}, "clip_norm: found -0.5"),
    ({"kind": "lion"}, "kind: found 'lion', expected one of adamw, sgd, momentum, adafactor, muon, normalised_sgd"),
])
def test_a_config_is_checked(change, message):
    with pytest.raises(ValueError, match=f"^OptimizerConfig.{message}"):
        optim.OptimizerConfig(**change)
