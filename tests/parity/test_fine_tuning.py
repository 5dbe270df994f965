"""The defenses of the fine-tuning stage against plain PyTorch, a few steps each."""

import contextlib

import jax
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from experiments.parity import pytorch_methods
from jaxvaccine import defenses, losses
from jaxvaccine.checkpoints import hugging_face
from tests.parity import suite

pytestmark = pytest.mark.usefixtures("quick_compile", "one_torch_thread")

# Two switches, and the proximal term from step 2 on.
LISA = (2, 2, 0.7, 1.0)


def fisher(model, problem):
    """Over the alignment batches of all steps, at the adapter that training starts from."""
    def init(adapter):
        frozen = hugging_face.load_model(problem.model_dir, dtype=problem.dtype)[1]
        weights = defenses.diagonal_fisher(
            losses.causal_lm_loss(model), adapter, frozen, [batches["alignment"] for batches in problem.batches])
        return defenses.ewc(losses.causal_lm_loss(model), 50.0, weights).init(adapter)
    return init


METHODS = {
    "lisa": (lambda model, problem: defenses.lisa(losses.causal_lm_loss(model), *LISA),
             lambda problem: pytorch_methods.Lisa(*LISA).gradient),
    "ewc": (lambda model, problem: defenses.ewc(losses.causal_lm_loss(model), 50.0)._replace(
                init=fisher(model, problem)),
            lambda problem: pytorch_methods.ewc_gradient(50.0, [b["alignment"] for b in problem.batches])),
    "kl": (lambda model, problem: defenses.kl(losses.loss_and_kl(model, block=8), 0.5),
           lambda problem: pytorch_methods.kl_gradient(0.5)),
}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "float64"])
@pytest.mark.parametrize("method", METHODS)
def test_steps(method, dtype, tiny_dir):
    exact = dtype == "float64"
    with jax.enable_x64(True) if exact else contextlib.nullcontext():
        problem = suite.tiny_problem(tiny_dir, "sft", dtype, steps=6, harmful_batch_size=4)
        problem = problem._replace(batches=[
            {"alignment": batches["alignment"], "user": batches["harmful"]} for batches in problem.batches])
        ours, theirs = METHODS[method]
        suite.check(problem, suite.FLOAT64 if exact else suite.FLOAT32,
                    lambda model: ours(model, problem), theirs(problem))
