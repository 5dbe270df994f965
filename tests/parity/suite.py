"""What it means that jaxvaccine equals PyTorch, in one function that tests and their mutants call."""

from typing import NamedTuple

import numpy as np

from experiments.parity import steps as parity
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.llama_config import LlamaConfig


class Tolerance(NamedTuple):
    """Largest differences that are allowed; relative but for the loss's and the probabilities'."""

    first_gradient: float  # where both sides are at the same weights
    gradient: float
    loss: float
    adapter: float
    probabilities: float


# At equal weights two float32 programs agree to rounding; what there is of it, Adam magnifies from step to step.
FLOAT32 = Tolerance(first_gradient=1e-5, gradient=1e-3, loss=1e-4, adapter=1e-3, probabilities=1e-5)
# What rounding does in float64 is far below any difference of meaning.
FLOAT64 = Tolerance(first_gradient=1e-10, gradient=1e-10, loss=1e-10, adapter=1e-10, probabilities=1e-10)


# Fifty steps for layers that freeze and come back; five show a method that has no schedule.
STEPS = dict.fromkeys(("repnoise", "repnoise_booster", "tar", "tar_booster"), 5)


def tiny_config(method: str, **values) -> AlignConfig:
    """A tiny run; without rematerialisation, which compiles sooner."""
    return parity.tiny_config(**{"remat": "none", "steps": STEPS.get(method, 50), **parity.METHODS[method], **values})


def tiny_problem(model_dir, method: str, dtype: str = "float32", architecture: LlamaConfig = parity.TINY, **values
                 ) -> parity.Problem:
    """`tiny_config`'s problem in a dtype, on a model that is written to model_dir."""
    return parity.tiny_problem(model_dir, tiny_config(method, **values), dtype, architecture)


def check(problem: parity.Problem, tolerance: Tolerance, defense_of=None, gradient=None) -> list[parity.StepRecord]:
    """Runs both sides and returns the PyTorch side's records; arguments as of `jax_steps` and `torch_steps`.

    Raises:
      AssertionError: they differ by more than the tolerance; names step and quantity.
    """
    found = list(parity.jax_steps(problem, defense_of))
    expected = list(parity.torch_steps(problem, [record.active_layers for record in found], gradient))
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        difference = parity.compare(ours, theirs, problem.adapter)
        limits = {"gradient": tolerance.gradient if step else tolerance.first_gradient, "loss": tolerance.loss,
                  "adapter": tolerance.adapter, "probabilities": tolerance.probabilities}
        for name, limit in limits.items():
            assert getattr(difference, name) <= limit, (
                f"step {step}: {name}: jaxvaccine and PyTorch differ by {getattr(difference, name):.2g}, "
                f"expected at most {limit}")
    moved = parity.distance(expected[-1].adapter, problem.adapter)
    assert moved > 0.01 * np.sqrt(parity.dot(problem.adapter, problem.adapter)), "training moved nothing to speak of"
    return expected
