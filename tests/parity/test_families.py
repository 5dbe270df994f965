"""Training steps of every family against plain PyTorch: gradients of the adapter and at the perturbation sites."""

import jax
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests import tiny
from tests.parity import suite

pytestmark = pytest.mark.usefixtures("quick_compile", "one_torch_thread")


# T-Vaccine probes in the first step, so that what it draws and perturbs depends on the gradients at the sites.
@pytest.mark.parametrize(("method", "dtype"), [
    ("t_vaccine_booster", "float64"), *(pytest.param(*each, marks=pytest.mark.long) for each in (
        ("vaccine", "float32"), ("repnoise", "float64"), ("tar", "float64")))])
# Gemma2 has all that differs: windows in some layers, caps, norms of its own, an embedding scale.
@pytest.mark.long
@pytest.mark.parametrize("family", [
    pytest.param("mistral", marks=pytest.mark.long), pytest.param("qwen2_window", marks=pytest.mark.long), "gemma2"])
def test_two_steps(family, method, dtype, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        problem = suite.tiny_problem(tmp_path / "model", method, dtype, tiny.FAMILIES[family], steps=2)
        suite.check(problem, suite.FLOAT64 if dtype == "float64" else suite.FLOAT32)
