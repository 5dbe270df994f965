"""Booster's approximation at its smallest setting, against gradients written out by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import approximation, common, lanes
from jaxvaccine import data
from jaxvaccine.losses import causal_lm_loss
from tests.experiments.test_lanes import world_model
from tests.experiments.test_sweep import ALIGN as SMALL

pytestmark = pytest.mark.usefixtures("quick_compile")

ALIGN = dataclasses.replace(SMALL, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return world_model(tmp_path_factory.mktemp("world"), layers=2)


def config_of(run_dir, model_dir, **changes):
    return approximation.ApproximationConfig(**{
        "run_dir": str(run_dir), "bases": (model_dir,), "methods": ("booster",), "seeds": ("0", "5"),
        "measure_every": 4, "harmful_probe": "world_harmful@harmful[0:4]",
        "alignment_probe": "world_refusal@train[0:3]", **changes})


def test_angle_and_ratio():
    x = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0])}
    for angle in (0.0, 1e-3, 1.0, 90.0, 180.0):
        radians = np.radians(angle)
        y = {"a": jnp.array([2 * np.cos(radians), 0.0]), "b": jnp.array([2 * np.sin(radians)])}
        found, ratio = approximation.compare(x, y)
        assert float(found) == pytest.approx(angle, abs=1e-5, rel=1e-3) and float(ratio) == pytest.approx(1.5)


def test_what_is_measured(model_dir):
    """Every lane's gradients from the losses themselves: Booster's is held against jax.grad of the regularizer."""
    base, tokenizer = common.load_base(model_dir, "checkpoint"), data.load_tokenizer(model_dir)
    config, method = config_of("r", model_dir), dataclasses.replace(ALIGN, defense="booster", lam=0.7, alpha=0.3)
    of = lanes.fresh(base, method, (0, 5))
    of = of._replace(adapters=jax.tree.map(lambda x: x + 0.05, of.adapters))
    found = approximation.measure_gradients(config, method, tokenizer)(0, of)
    loss_fn = causal_lm_loss(of.model)
    batches = {}
    for name, source in (("f", config.alignment_probe), ("h", config.harmful_probe)):
        rows = data.tokenize_examples(tokenizer, data.load_examples(source), 64)
        batches[name] = data.collate(rows, range(len(rows.input_ids)))

    def flat(tree):
        return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])

    for lane in range(2):
        adapter, frozen = of.lane(lane)

        def loss(adapter, name, frozen=frozen):
            return loss_fn(adapter, frozen, batches[name])[0]

        def after(adapter, loss=loss, stop=False):
            grads = jax.grad(loss)(adapter, "h")
            grads = jax.lax.stop_gradient(grads) if stop else grads
            norm = jnp.sqrt(sum((g ** 2).sum() for g in jax.tree.leaves(grads)))
            return jax.tree.map(lambda w, g: w - 0.3 * g / norm, adapter, grads)

        def regularizer(adapter, loss=loss, after=after, stop=False):
            return loss(adapter, "h") - loss(after(adapter, stop=stop), "h")

        f = flat(jax.jit(jax.grad(lambda a: loss(a, "f")))(adapter))
        exact = flat(jax.jit(jax.grad(regularizer))(adapter))
        approximate = flat(jax.jit(jax.grad(lambda a: regularizer(a, stop=True)))(adapter))
        for name, x, y in (("regularizer", approximate, exact), ("total", f + 0.7 * approximate, f + 0.7 * exact)):
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            assert found[f"{name}_angle"][lane] == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-2, abs=0.05)
            assert found[f"{name}_ratio"][lane] == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y), rel=1e-3)
        norm = np.linalg.norm(flat(jax.grad(loss)(adapter, "h")))
        assert found["predicted_drop"][lane] == pytest.approx(0.3 * norm, rel=1e-4)
        assert found["real_drop"][lane] == pytest.approx(float(regularizer(adapter)), rel=1e-3, abs=1e-5)
    assert found["regularizer_angle"].min() > 1, "the two gradients are hardly different: nothing is tested"


def test_a_run_and_its_continuation(model_dir, tmp_path):
    config = config_of(tmp_path / "a", model_dir, methods=("booster", "booster:exact=true"))
    report = approximation.approximation(config, ALIGN)
    rows = [line.split("|")[1:3] for line in report.splitlines() if line.startswith("| booster")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [method, step] for method in config.methods for step in ("0", "4", "6")]
    root = tmp_path / "a"
    assert (root / "approximation.png").stat().st_size > 1000 and (root / "report.md").read_text() == report
    before = {path: path.stat().st_mtime_ns for path in root.rglob("aligned.json")}
    assert len(before) == 2
    ours, exact = (json.loads(path.read_text()) for path in sorted(before))
    assert ours["real_drop"][0] == exact["real_drop"][0] and ours["real_drop"][-1] != exact["real_drop"][-1]
    assert approximation.approximation(config, ALIGN) == report
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("changes, expected", [
    ({"run_dir": ""}, "--run_dir: found ''"), ({"seeds": ("-1",)}, "--seeds: found .*numbers of at least 0"),
    ({"harmful_probe": ""}, "--harmful_probe: found ''"), ({"measure_every": 0}, "--measure_every: found 0")])
def test_flags(changes, expected):
    with pytest.raises(ValueError, match=expected):
        config_of("r", "m", **changes) if "run_dir" not in changes else config_of("", "m")


def test_a_method_without_a_regularizer(model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"--methods: found 'booster:lam=0'.*expected both above 0"):
        approximation.approximation(config_of(tmp_path / "a", model_dir, methods=("booster:lam=0",)), ALIGN)
    assert not (tmp_path / "a").exists()
