"""Every method against plain PyTorch in float32: gradients, and trajectories of fifty steps."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from experiments.parity import steps as parity
from tests.parity import suite

pytestmark = pytest.mark.usefixtures("quick_compile", "one_torch_thread")


# All are compared in float64 in any case (test_float64.py).
SHORT = ("booster",)


@pytest.mark.parametrize("method", [
    pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in parity.METHODS])
def test_steps(method, tiny_dir):
    """Clipping, decay, warm-up and cosine; T-Vaccine's layers freeze and come back among its fifty."""
    records = suite.check(suite.tiny_problem(tiny_dir, method), suite.FLOAT32)
    norms = [np.sqrt(parity.dot(record.gradient, record.gradient)) for record in records]
    clip_norm = parity.TINY_FLAGS["clip_norm"]
    assert max(norms) > clip_norm, "nothing was clipped"
    if "t_vaccine" in method:
        active = np.stack([record.active_layers for record in records])
        assert (active.sum(axis=1) == 2).all()
        changes = np.diff(active.astype(int), axis=0)
        assert any(-1 in layer and 1 in layer[list(layer).index(-1):] for layer in changes.T), "no layer came back"
        assert not active[:, 0].all(), "the first layer was always active"


@pytest.mark.long
@pytest.mark.parametrize("method", parity.METHODS)
def test_with_rematerialisation(method, tiny_dir):
    suite.check(suite.tiny_problem(tiny_dir, method, remat="full", steps=10), suite.FLOAT32)


@pytest.mark.parametrize("method", ["booster", pytest.param("t_vaccine_released", marks=pytest.mark.long)])
def test_on_three_projections(method, tiny_dir):
    """As Booster was published."""
    problem = suite.tiny_problem(tiny_dir, method, targets=("q_proj", "k_proj", "v_proj"), steps=5)
    suite.check(problem, suite.FLOAT32)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_schedules(schedule, tiny_dir):
    suite.check(suite.tiny_problem(tiny_dir, "sft", schedule=schedule, steps=5), suite.FLOAT32)
