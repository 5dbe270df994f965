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
    ("t_vaccine_booster", "float64"), ("vaccine", "float32"), ("repnoise", "float64"), ("tar", "float64")])
@pytest.mark.parametrize("family", ["mistral", "qwen2_window", "gemma2"])
def test_two_steps(family, method, dtype, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        problem = suite.tiny_problem(tmp_path / "model", method, dtype, tiny.FAMILIES[family], steps=2)
        suite.check(problem, suite.FLOAT64 if dtype == "float64" else suite.FLOAT32)
