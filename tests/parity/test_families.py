"""Training steps of every family against plain PyTorch: gradients of the adapter, and of the perturbation sites."""

import jax
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from experiments import parity
from tests import tiny
from tests.parity import suite

pytestmark = pytest.mark.usefixtures("quick_compile", "one_torch_thread")
# T-Vaccine probes in the first step, so that both steps depend on the gradients at the sites.
CASES = {"t_vaccine": ("float64", suite.FLOAT64), "booster": ("float64", suite.FLOAT64),
         "vaccine": ("float32", suite.FLOAT32)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", CASES)
def test_two_steps(family, method, tmp_path):
    dtype, tolerance = CASES[method]
    with jax.enable_x64(dtype == "float64"):
        config = suite.tiny_config(method, dtype=dtype, steps=2)
        suite.check(parity.tiny_problem(tmp_path / "model", config, tiny.FAMILIES[family]), tolerance)
