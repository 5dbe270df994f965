"""Booster's approximation at its smallest setting, against gradients written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import approximation
from jaxvaccine import data
from jaxvaccine.experiment.config import make
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.report.results import pick, read_results
from tests.experiments import small
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")

PROBES = {"harmful_probe": "world_harmful@harmful[0:4]", "alignment_probe": "world_refusal@train[0:3]"}


def flags(model_dir, run_dir, *more):
    return (f"--run_dir={run_dir}", f"--model={model_dir}", *small.FLAGS, "--measure_every=4",
            *(f"--{name}={source}" for name, source in PROBES.items()), *more)


def test_angle_and_ratio():
    x = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0])}
    for angle in (0.0, 1e-3, 1.0, 90.0, 180.0):
        radians = np.radians(angle)
        y = {"a": jnp.array([2 * np.cos(radians), 0.0]), "b": jnp.array([2 * np.sin(radians)])}
        found, ratio = approximation.compare(x, y)
        assert float(found) == pytest.approx(angle, abs=1e-5, rel=1e-3) and float(ratio) == pytest.approx(1.5)


@pytest.mark.long
def test_what_is_measured(model_dir):
    """Every lane's gradients from the losses themselves: Booster's is held against jax.grad of the regularizer."""
    method = small.align_config(model_dir, defense="booster", lam=0.7, alpha=0.3)
    tokenizer, _, of = small.moved_lanes(model_dir, method)
    config = make(approximation.ApproximationConfig, {"run_dir": "r", "model": (model_dir,), **PROBES})
    found = approximation.make_probes(config).alignment(method, tokenizer, small.SEEDS)(0, of)
    loss_fn = causal_lm_loss(of.model)
    batches = {}
    for name, source in (("f", config.alignment_probe), ("h", config.harmful_probe)):
        rows = data.tokenize_examples(tokenizer, data.load_examples(source), 64)
        batches[name] = data.collate(rows, range(len(rows.input_ids)))

    def loss(adapter, name):
        return loss_fn(adapter, of.frozen, batches[name])[0]

    def after(adapter, stop):
        grads = jax.grad(loss)(adapter, "h")
        grads = jax.lax.stop_gradient(grads) if stop else grads
        norm = jnp.sqrt(sum((g ** 2).sum() for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda w, g: w - 0.3 * g / norm, adapter, grads), norm

    def regularizer(adapter, stop):
        stepped, norm = after(adapter, stop)
        return loss(adapter, "h") - loss(stepped, "h"), norm

    @jax.jit
    def expectation(adapter):
        (drop, norm), exact = jax.value_and_grad(regularizer, has_aux=True)(adapter, stop=False)
        approximate, _ = jax.grad(regularizer, has_aux=True)(adapter, stop=True)
        return jax.grad(loss)(adapter, "f"), exact, approximate, (drop, norm)

    def flat(tree):
        return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])

    for lane in range(2):
        *gradients, (drop, norm) = expectation(of.lane(lane)[0])
        f, exact, approximate = map(flat, gradients)
        for name, x, y in (("regularizer", approximate, exact), ("total", f + 0.7 * approximate, f + 0.7 * exact)):
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            assert found[f"{name}_angle"][lane] == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-2, abs=0.05)
            assert found[f"{name}_ratio"][lane] == pytest.approx(np.linalg.norm(x) / np.linalg.norm(y), rel=1e-3)
        assert found["predicted_drop"][lane] == pytest.approx(0.3 * float(norm), rel=1e-4)
        assert found["real_drop"][lane] == pytest.approx(float(drop), rel=1e-3, abs=1e-5)
    assert found["regularizer_angle"].min() > 1, "the two gradients are hardly different: nothing is tested"


@pytest.mark.long
def test_a_run_and_its_continuation(model_dir, tmp_path):
    root = tmp_path / "a"
    small.call(approximation.VERB, *flags(model_dir, root))
    report = (root / "report.md").read_text()
    assert [row[:2] for row in rows_of(report)[1:]] == [
        [method, step] for method in ("Booster", "Booster (exact)") for step in ("0", "4", "6")]
    assert (root / "approximation.png").stat().st_size > 1000 and "(approximation.png)" in report
    table = read_results(root)
    assert {measure: len(pick(table, measure=measure)) for measure in approximation.MEASURED} == dict.fromkeys(
        approximation.MEASURED, 2 * 2 * 3)
    drops = pick(table, measure="real_drop", seed=0)
    ours, exact = (pick(drops, method=name)["value"].tolist() for name in ("booster", "booster:exact=true"))
    assert ours[0] == exact[0] and ours[-1] != exact[-1]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("aligned.json")}
    assert len(before) == 4
    small.call(approximation.VERB, *flags(model_dir, root))
    assert (root / "report.md").read_text() == report
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("flag, expected", [
    ("--run_dir=", "--run_dir: found ''"), ("--seeds=-1", "--seeds: found .*numbers of at least 0"),
    ("--harmful_probe=", "--harmful_probe: found ''"), ("--alignment_probe=nonsense@x", "--alignment_probe: "),
    ("--measure_every=0", "--measure_every: found 0"),
    ("--defenses=booster:lam=0", "--defenses: found Booster.*lam=0.*expected Booster with lam and alpha above 0"),
    ("--defenses=booster:alpha=0", "--defenses: found Booster.*alpha=0.*expected Booster with lam and alpha above 0"),
    ("--defenses=sft", "--defenses: found Sft.*expected Booster with lam and alpha above 0")])  # fmt: skip
def test_flags(model_dir, tmp_path, flag, expected):
    with pytest.raises(SystemExit, match=expected):
        small.call(approximation.VERB, *flags(model_dir, tmp_path / "a", flag))
    assert not (tmp_path / "a").exists()
