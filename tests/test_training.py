"""The step and the loop: logged, saved, interrupted and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxvaccine import defenses, optim, training
from jaxvaccine.checkpoints.orbax_state import open_checkpoints
from tests import tiny, training_run
from tests.defenses import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)


def same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda f, e: np.testing.assert_array_equal(
        np.asarray(f).reshape(-1).view(np.uint8), np.asarray(e).reshape(-1).view(np.uint8)), found, expected)


def metrics(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, quick_compile):
    """name -> (folder, final state) of a run without interruption."""
    runs = {}

    def get(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            runs[name] = folder, training_run.run(folder, name)
        return runs[name]

    return get


# The step


def test_a_step_is_gradient_then_optimizer():
    defense = defenses.t_vaccine(toy.loss_fn, layers=2, sample_every=1)
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(1e-2), 4)
    adapter, frozen = toy.trees()
    state = training.init_train_state(adapter, defense, optimizer)
    train_step, gradient, update = training.make_train_step(defense, optimizer), jax.jit(defense.gradient), jax.jit(
        optimizer.update)
    expected, optimizer_state, defense_state = adapter, optimizer.init(adapter), defense.init(adapter)
    for step in range(3):
        grads, defense_state, _ = gradient(
            expected, frozen, defense_state, toy.batches(step), jax.random.fold_in(KEY, step))
        updates, optimizer_state = update(grads, optimizer_state, expected, trainable=defense_state.active_layers)
        before, expected = expected, optax.apply_updates(expected, updates)
        state, step_metrics = train_step(state, frozen, toy.batches(step), KEY)
        assert state.step == step + 1
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-7), state.adapter, expected)
        np.testing.assert_allclose(step_metrics["gradient_norm"], optax.tree.norm(grads), rtol=1e-5)
        for name in before:
            still = ~np.asarray(state.defense.active_layers)
            np.testing.assert_array_equal(np.asarray(expected[name])[still], np.asarray(before[name])[still])


@pytest.mark.parametrize("base", ["t_vaccine", "booster"])
def test_what_is_frozen_as_released_does_not_move_bit_for_bit(base):
    """Neither weights nor moments nor count, which is each leaf's and layer's own."""
    defense = defenses.t_vaccine(toy.blocks_loss, layers=1, sample_every=1, freeze="released", in_mlp=toy.in_mlp)
    if base == "booster":
        defense = defenses.booster(toy.blocks_loss, base=defense)
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(1e-2), 8)
    adapter, frozen = toy.trees()
    state = training.init_train_state(toy.in_blocks(adapter), defense, optimizer)
    train_step, counts = training.make_train_step(defense, optimizer), {"attention": 0, "mlp": 0}
    first_layers = set()
    for step in range(8):
        before = jax.tree.map(np.array, (state.adapter["layers"], state.optimizer[1]["layers"]))
        state, _ = train_step(state, frozen, toy.batches(step), KEY)
        after = jax.tree.map(np.array, (state.adapter["layers"], state.optimizer[1]["layers"]))
        active = np.asarray(state.defense.active_layers)
        first_layers.add(int(active.argmax()))
        for name, on in {"attention": active, "mlp": np.arange(toy.L) >= active.argmax()}.items():
            counts[name] = counts[name] + on
            of_block = [jax.tree.leaves([part[name] for part in parts]) for parts in (before, after)]
            assert len(of_block[0]) == 4
            for old, new in zip(*of_block, strict=True):
                same_bits(new[~on], old[~on])
                assert (old[on] != new[on]).reshape(on.sum(), -1).any(axis=1).all()
                if new.dtype == np.int32:
                    np.testing.assert_array_equal(new, counts[name])
    assert len(first_layers) > 2


@pytest.mark.parametrize("freeze", ["layer", "released"])
def test_it_traces_once_though_layers_change(freeze):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return toy.blocks_loss(*args, **kwargs)

    defense = defenses.t_vaccine(counted, layers=2, sample_every=1, probe_every=2, freeze=freeze,
                                 in_mlp=toy.in_mlp)
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(1e-2, "cosine", 0.1), 8)
    adapter, frozen = toy.trees()
    adapter = toy.in_blocks(adapter)
    train_step, state = training.make_train_step(defense, optimizer), training.init_train_state(
        adapter, defense, optimizer)
    seen, traces = set(), []
    for step in range(8):
        state, step_metrics = train_step(state, frozen, toy.batches(step), KEY)
        seen.add(tuple(np.asarray(step_metrics["active_layers"]).tolist()))
        traces.append(len(calls))
    assert len(seen) > 2 and traces[-1] == traces[0] > 0


def test_the_state_is_donated_and_the_callers_adapter_survives():
    make_state, train_step, frozen, adapter = training_run.prepare("t_vaccine")
    before, state = jax.tree.map(np.array, adapter), make_state()
    new, _ = train_step(state, frozen, training_run.batches(0), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.adapter))
    same_bits(adapter, before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, new)))


def test_randomness_is_that_of_key_and_step():
    make_state, train_step, frozen, _ = training_run.prepare("t_vaccine")
    states = [make_state(), make_state(), make_state(), make_state()._replace(step=jnp.int32(5))]
    keys = [KEY, KEY, jax.random.key(1), KEY]
    losses = [float(train_step(s, frozen, training_run.batches(0), k)[1]["loss"])
              for s, k in zip(states, keys, strict=True)]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_any_optimizer_of_optax_will_do():
    optimizer = optax.sgd(0.1)
    defense = defenses.sft(toy.no_dropout)
    adapter, frozen = toy.trees()
    state = training.init_train_state(adapter, defense, optimizer)
    state, _ = training.make_train_step(defense, optimizer)(state, frozen, toy.batches(), KEY)
    grads = jax.grad(lambda a: toy.no_dropout(a, frozen, toy.batch())[0])(adapter)
    jax.tree.map(lambda f, w, g: np.testing.assert_allclose(f, w - 0.1 * g, rtol=1e-5, atol=1e-7),
                 state.adapter, adapter, grads)


# Resuming


@pytest.mark.parametrize("name, at", [
    ("t_vaccine", 7), *(pytest.param(*each, marks=pytest.mark.long) for each in (
        ("t_vaccine", 4), ("booster", 4), ("booster", 7), ("t_vaccine_released", 7)))])
def test_resume_bit_for_bit(tmp_path, uninterrupted, name, at):
    folder, expected = uninterrupted(name)
    training_run.run(tmp_path, name, steps=at)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        # What a kill after the checkpoint leaves: whole lines of steps that will be done again, and a torn one.
        log.write(json.dumps({"step": at, "loss": -1.0}) + '\n{"step": 9, "lo')
    same_bits(training_run.run(tmp_path, name), expected)
    assert metrics(tmp_path) == metrics(folder)
    assert [line["step"] for line in metrics(folder)] == list(range(training_run.STEPS))


def test_a_finished_run_does_nothing(tmp_path, uninterrupted):
    _, expected = uninterrupted("booster")
    training_run.run(tmp_path, "booster")
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def none(step):
        raise AssertionError("a finished run asked for a batch")

    same_bits(training_run.run(tmp_path, "booster", batches=none), expected)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_leaves_whole_checkpoints(tmp_path, uninterrupted):
    def interrupted(step):
        if step == 5:
            raise KeyboardInterrupt
        return training_run.batches(step)

    with pytest.raises(KeyboardInterrupt):
        training_run.run(tmp_path, "t_vaccine", batches=interrupted)
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 4
    folder, expected = uninterrupted("t_vaccine")
    same_bits(training_run.run(tmp_path, "t_vaccine"), expected)
    assert metrics(tmp_path) == metrics(folder)


@pytest.mark.long
def test_killed_and_run_again(tmp_path, uninterrupted):
    """SIGKILL at any moment after the first checkpoint; the same command again ends where it would have ended."""
    command = [sys.executable, "-m", "tests.training_run", str(tmp_path), "t_vaccine"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen([*command, "0.3"], env=environment, cwd=root, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "checkpoints").glob("[0-9]")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.02)
        time.sleep(random.random())
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "state.npz").exists()
    subprocess.run([*command, "0"], env=environment, cwd=root, check=True, capture_output=True)
    folder, expected = uninterrupted("t_vaccine")
    with np.load(tmp_path / "state.npz") as found:
        same_bits([found[name] for name in found.files], jax.tree.leaves(expected))
    assert metrics(tmp_path) == metrics(folder)


# The loop, around a step that only counts


def fit(bad=None, steps=8, first=0, **options):
    """`bad`: (metric, step) at which it is NaN."""
    def train_step(state, frozen, batches, key):
        values = {"loss": 1.5, "gradient_norm": 1.0, "probabilities": np.ones(2),
                  "active_layers": np.array([True, False])}
        if bad and int(state.step) == bad[1]:
            values[bad[0]] = values[bad[0]] * np.nan
        return state._replace(step=state.step + 1), values

    state = training.TrainState(jnp.int32(first), None, None, None)
    return training.fit(train_step, state, None, options.pop("batches", batches), steps=steps, key=KEY,
                        progress=options.pop("progress", False), **options)


def batches(step):
    return {"alignment": tiny.batch(step, 2, 8), "harmful": tiny.batch(step + 1, 1, 4)}


@pytest.mark.parametrize("metric", ["loss", "gradient_norm", "probabilities"])
@pytest.mark.parametrize("step", [0, 5, 7])
def test_a_nan_ends_training_and_is_not_saved(tmp_path, metric, step):
    saved, path = [], tmp_path / "metrics.jsonl"
    with pytest.raises(FloatingPointError, match=rf"^step {step}: {metric}: found .*nan.*, expected finite numbers$"):
        fit((metric, step), save=lambda done, state: saved.append(done), save_every=2, metrics_path=path)
    assert saved == [done for done in (2, 4, 6) if done <= step]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(step + 1))


@pytest.mark.parametrize("save_every, expected", [(0, [7]), (1, [3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7])])
def test_when_it_saves(save_every, expected):
    saved = []
    state = fit(steps=7, first=2, save=lambda done, state: saved.append((done, int(state.step))), save_every=save_every)
    assert saved == [(done, done) for done in expected] and state.step == 7


def test_a_bad_batch_is_refused_before_its_step(tmp_path):
    def batches_with_a_bad_one(step):
        good = batches(step)
        if step == 3:
            good["harmful"]["labels"][:] = -100
        return good

    saved = []
    with pytest.raises(ValueError, match="no supervised label"):
        fit(batches=batches_with_a_bad_one, save=lambda done, state: saved.append(int(state.step)), save_every=1)
    assert saved == [1, 2, 3]


def test_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fit(steps=3, metrics_path=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for step, line in enumerate(lines):
        tokens = sum(int(b["attention_mask"].sum()) for b in batches(step).values())
        assert line.pop("seconds") >= 0
        assert line == {"step": step, "loss": 1.5, "gradient_norm": 1.0, "probabilities": [1.0, 1.0],
                        "active_layers": [True, False], "tokens": tokens}


@pytest.mark.parametrize(
    "tail", ['{"step": 3, "lo', "\0\0\0", "", "3", '{"loss": 1}', '\n\n{"step": 3}\n{"step": 7}\n'])
def test_metrics_of_an_interrupted_run(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 0, "loss": 9.0}\n{"step": 1, "loss": 9.0}\n'
    path.write_text(kept + '{"step": 2, "loss": 9.0}\n' + tail)
    fit(steps=4, first=2, metrics_path=path)
    text = path.read_text()
    assert text.startswith(kept)
    assert [(line["step"], line["loss"]) for line in map(json.loads, text.splitlines())] == [
        (0, 9.0), (1, 9.0), (2, 1.5), (3, 1.5)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_the_bar(capsys):
    fit(steps=3, first=1, progress=True, description="align")
    bar = capsys.readouterr().err
    assert "align: 100%" in bar and "3/3" in bar and "loss 1.5000" in bar and "tokens/s" in bar
    fit(steps=3)
    assert capsys.readouterr().err == ""


# Checkpoints


def test_what_is_saved_is_the_state_of_its_step(tmp_path):
    """Its buffers are donated right after save() returns, while Orbax still writes."""
    import orbax.checkpoint as ocp

    advance = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"big": jnp.zeros(1_000_000), "rows": [jnp.zeros((3, 2)), jnp.zeros((), jnp.int32)]}
    with open_checkpoints(tmp_path, keep=4) as checkpoints:
        for step in range(1, 5):
            state = advance(state)
            checkpoints.save(step, state)
            state = advance(state)
        assert checkpoints.latest_step() in (3, 4)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1, 2, 3, 4]
        for step in range(1, 5):
            restored = manager.restore(step, args=ocp.args.StandardRestore(state))
            assert {float(v) for leaf in jax.tree.leaves(restored) for v in np.unique(leaf)} == {2.0 * step - 1}


def test_a_restored_state_may_be_donated(tmp_path):
    state = {"x": jnp.arange(1000.0)}
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    with open_checkpoints(tmp_path) as checkpoints:
        advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
        advance(checkpoints.restore(state))
        same_bits(checkpoints.restore(state), state)


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    with open_checkpoints(tmp_path / "a" / "b", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/a/b: found no checkpoint"):
            checkpoints.restore({"x": jnp.zeros(2)})
        for step in (1, 2, 3, 3):
            checkpoints.save(step, {"x": jnp.full(2, step)})
    with open_checkpoints(tmp_path / "a" / "b") as checkpoints:
        checkpoints.save(3, {"x": jnp.full(2, 9)})
        np.testing.assert_array_equal(checkpoints.restore({"x": jnp.zeros(2, int)})["x"], 3)
    assert sorted(p.name for p in (tmp_path / "a" / "b").glob("[0-9]*")) == ["2", "3"]


def toy_state(optimizer=None, defense=None, adapter=None):
    optimizer = optimizer or optim.layer_masked_adamw(optim.OptimizerConfig(), 4)
    return training.init_train_state(adapter or toy.trees()[0], defense or defenses.sft(toy.loss_fn), optimizer)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("other", [
    {"optimizer": optax.sgd(0.1)}, {"optimizer": optax.adam(0.1)},
    {"defense": defenses.t_vaccine(toy.loss_fn, layers=2)},
    {"adapter": {"a": jnp.zeros((4, 5, 5))}},
    {"adapter": {"a": jnp.zeros((4, 5, 5)), "b": jnp.zeros((4, 5)), "c": jnp.zeros((4, 5))}},
], ids=["sgd", "adam", "t_vaccine", "fewer", "more"])
def test_the_state_of_another_run_is_refused(tmp_path, other):
    for saved, like in (({}, other), (other, {})):
        folder = tmp_path / str(len(saved))
        with open_checkpoints(folder) as checkpoints:
            checkpoints.save(3, toy_state(**saved))
        with open_checkpoints(folder) as checkpoints, pytest.raises(
                ValueError, match=f"{folder}: checkpoint 3: found a state that is not of this run's"):
            checkpoints.restore(toy_state(**like))


def test_a_state_of_other_shapes_is_refused(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, toy_state())
        wide = toy_state(adapter={"a": jnp.zeros((4, 5, 5)), "b": jnp.zeros((4, 6))})
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(
            ValueError, match=rf"{tmp_path}: checkpoint 3: adapter.b: found shape \(4, 5\), expected \(4, 6\)"):
        checkpoints.restore(wide)


def test_active_layers_that_nobody_freezes_are_an_error():
    """A defense that keeps them in its state says so to the optimizer; otherwise all layers would move unnoticed."""
    class State(NamedTuple):
        active_layers: jax.Array

    adapter = {"layers": {"a": jnp.ones((3, 2))}}
    defense = defenses.Defense(lambda adapter: State(jnp.array([True, False, True])), lambda *args: None)
    with pytest.raises(ValueError, match=r"found active_layers in its state and no trainable"):
        training.init_train_state(adapter, defense, optim.layer_masked_adamw(optim.OptimizerConfig(), 2))
    training.init_train_state(adapter, defense._replace(trainable=lambda state, adapter: state.active_layers),
                              optim.layer_masked_adamw(optim.OptimizerConfig(), 2))
