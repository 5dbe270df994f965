"""Whole training steps of every method, gradient, clipping and AdamW, beside PyTorch's: both sides in one run, in turn.

  python -m experiments.benchmarks.against_pytorch --repeats=3

The same random weights, adapter, batches and draws. PyTorch's step is as its users write it: transformers' model with
its own loss, PEFT's LoRA, hooks, torch.optim, eager, and without checkpointing unless --checkpointing asks for it. Both
sides have the same cores, and find the same loss and norm of the gradient, or the benchmark ends with an error.
Needs torch and peft (the `parity` extra).
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
from absl import flags

from experiments.benchmarks.our_step import Ours, StepPart, differences
from jaxvaccine import cli
from jaxvaccine.evaluation.generate import available_cores
from jaxvaccine.experiment.config import field, make
from jaxvaccine.report.tables import table

PAUSE = 0.3  # seconds between steps: threads of the side that has ended wait for more work, and keep cores busy


@dataclasses.dataclass(frozen=True)
class AgainstConfig(StepPart):
    """Benchmark."""

    device: Literal["cpu", "gpu"] = field("cpu", "Where both sides run.")
    repeats: int = field(5, "Timed rounds, after one that is not counted.", at_least=1)


class Times(NamedTuple):
    """Seconds of steps of one kind, a pair for each round."""

    ours: list[float]
    theirs: list[float]

    def ratio(self) -> str:
        """How many times as long PyTorch takes: median (least–most)."""
        ratios = [b / a for a, b in zip(self.ours, self.theirs, strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


class Compared(NamedTuple):
    """A method."""

    usual: Times
    due: Times | None  # steps with T-Vaccine's probe
    loss_difference: float  # largest of all steps, relative
    norm_difference: float  # of the gradient's norm, in the first step


def _timed(side: Any) -> float:
    side.wait()
    time.sleep(PAUSE)
    started = time.perf_counter()
    side.step()
    side.wait()
    return time.perf_counter() - started


def compare(config: AgainstConfig, name: str, model: Any, frozen: Any, theirs_model: Any) -> Compared:
    """Steps of one method on both sides.

    Raises:
      FloatingPointError: they are not the same computation.
    """
    from experiments.benchmarks.pytorch_step import Theirs

    # Every other of T-Vaccine's steps has a probe and a draw.
    probes = name == "t_vaccine"
    method = config.method(name, every=2)
    ours, theirs = Ours(config, method, model, frozen), Theirs(config, method, theirs_model)
    rounds = {kind: Times([], []) for kind in (("due", "usual") if probes else ("usual",))}
    apart = {"loss": 0.0, "gradient_norm": 0.0}
    for i in range(1 + config.repeats):
        for times in rounds.values():
            seconds = _timed(ours)
            found = ours.last()._asdict()
            theirs.draws = found["active_layers"]
            pair = seconds, _timed(theirs)
            expected = theirs.last()._asdict()
            for of in _compared(name, theirs.done):
                if wrong := differences(config, f"{name}, step {theirs.done}", found, expected, (of,)):
                    raise FloatingPointError(*wrong)
                apart[of] = max(apart[of], abs(found[of] / expected[of] - 1))
            if i:
                times.ours.append(pair[0])
                times.theirs.append(pair[1])
    return Compared(rounds["usual"], rounds.get("due"), *apart.values())


def _compared(name: str, step: int) -> tuple[str, ...]:
    """What the two sides must agree on in a step, counted from 1: later ones start where Adam has magnified rounding,
    and RepNoise's noise is shared in the first alone."""
    return ("loss", "gradient_norm") if step == 1 else () if name == "repnoise" else ("loss",)


def measure(config: AgainstConfig) -> Iterator[tuple[str, Compared]]:
    """Method by method, as they are measured."""
    import torch

    from experiments.benchmarks import pytorch_step, random_weights

    torch.set_num_threads(available_cores())
    model = config.llama()
    frozen = random_weights.frozen(model)
    theirs = pytorch_step.make_model(config, "cuda" if config.device == "gpu" else "cpu")
    for name in config.methods:
        yield name, compare(config, name, model, frozen, theirs)


def lines(config: AgainstConfig, name: str, of: Compared) -> Iterator[list[str]]:
    """Rows of the table."""
    def line(what: str, times: Times) -> list[str]:
        return [what, *(f"{statistics.median(seconds):.3g}" for seconds in times), times.ratio(),
                f"{of.loss_difference:.1g}", f"{of.norm_difference:.1g}"]

    yield line(name, of.usual)
    if of.due:
        every = config.probe_every
        spread = [[((every - 1) * a + b) / every for a, b in zip(usual, due, strict=True)]
                  for usual, due in zip(of.usual, of.due, strict=True)]
        yield line(f"{name}, a step with its probe", of.due)
        yield line(f"{name}, with a probe every {every} steps", Times(*spread))


def benchmark(config: AgainstConfig) -> str:
    """The Markdown table, with what it was measured on."""
    load, rows = os.getloadavg()[0], []
    for name, of in measure(config):
        for row in lines(config, name, of):
            rows.append(row)
            print(*row, file=sys.stderr, flush=True)
    loss = "logits of supervised positions" if config.supervised_logits else "transformers' loss"
    return "\n".join([
        f"{config.model}, {config.dtype}, {config.rows} rows of {config.length} tokens, {config.supervised} "
        f"supervised, LoRA rank {config.rank} on {', '.join(config.targets)}; {jax.devices()[0].platform}, "
        f"{available_cores()} threads, load {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end. Ours: "
        f"remat={config.remat}, attention by {config.attention}. PyTorch: {loss}, {config.pytorch_attention}, "
        f"{'with' if config.checkpointing else 'without'} checkpointing.\n",
        table(["", "jaxvaccine, s", "PyTorch, s", "PyTorch / jaxvaccine", "losses differ by", "gradient norms"], rows),
        f"Medians of {config.repeats} rounds, of the ratio (least–most): above 1, jaxvaccine is faster. The losses of "
        "all steps and the gradient norms of the first differ by at most so much of PyTorch's."])


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config = make(AgainstConfig, cli.given(cli.Section(AgainstConfig), values))
        if config.device == "cpu":
            jax.config.update("jax_platforms", "cpu")
        else:
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
            jax.config.update("jax_default_matmul_precision", "highest" if config.dtype == "float32" else None)
        print(benchmark(config))


VERB = cli.Verb(__doc__, (cli.Section(AgainstConfig),), call)

if __name__ == "__main__":
    cli.call("against_pytorch", VERB)
