"""What padding costs: positions that the passes of a step read, with one length for all batches and with their own.

  python -m experiments.benchmarks.lengths --model=models/mine \\
      --alignment_data=beavertails_refusal:train.jsonl --harmful_data=beavertails_unsafe:train.jsonl

Nothing is trained: the batches are those of a run with these settings.
"""

import dataclasses

import numpy as np
from absl import flags

from jaxvaccine import cli, data
from jaxvaccine.data.batching import batch_lengths, training_batches
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.align import AlignmentData, load_data, tokenize
from jaxvaccine.experiment.config import Part, field, make
from jaxvaccine.experiment.methods import Booster
from jaxvaccine.report.tables import table

PROBE_EVERY = 200  # K of the published recipe
# How many passes over an alignment batch and over a harmful one are in a step.
PASSES = {"booster": (1, 2), "t_vaccine": (2, 1 / PROBE_EVERY)}


@dataclasses.dataclass(frozen=True)
class BatchesPart(Part):
    """Benchmark."""

    model: str = field("smollm2", "Whose tokenizer; smollm2 is SmolLM2-135M-Instruct of the package index.")
    batch_size: int = field(10, "Rows of an alignment batch.", at_least=1)
    steps: int = field(2000, "Steps whose batches are looked at.", at_least=1)
    seed: int = field(0, "Of the batches' order.", at_least=0, below=2**32)


@dataclasses.dataclass(frozen=True)
class LengthsConfig:
    """All that the batches depend on."""

    data: AlignmentData
    batches: BatchesPart = BatchesPart()


def positions(config: LengthsConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Padded lengths [steps, 2] of the alignment's and the harmful batches: with one common length, with their own, and
    those that the rows need."""
    from jaxvaccine.checkpoints import smollm2

    part, of = config.batches, config.data
    model = str(smollm2.fetch()) if part.model == "smollm2" else part.model
    tokenized = tokenize(stage.load_tokenizer(model), load_data(of, Booster()), of)
    sizes = {"alignment": part.batch_size, "harmful": of.harmful_batch_size}
    sources = {name: (rows, sizes[name]) for name, rows in tokenized.items()}
    own = batch_lengths([sources], [part.seed], of.bucket, part.steps)
    batches = training_batches(sources, part.seed, of.bucket)
    common, needed = [], []
    for step in range(part.steps):
        found = batches(step)
        common.append([found[name]["input_ids"].shape[1] for name in sizes])
        needed.append([data.bucket_length(int(found[name]["attention_mask"].sum(axis=1).max()), of.bucket)
                       for name in sizes])
    return np.array(common), np.stack([own[name] for name in sizes], axis=1), np.array(needed)


def benchmark(config: LengthsConfig) -> str:
    """The Markdown table."""
    found, lines = positions(config), []
    rows = np.array([config.batches.batch_size, config.data.harmful_batch_size])
    for method, passes in PASSES.items():
        costs = [(lengths @ (rows * passes)).mean() for lengths in found]
        lines.append([method, *(f"{cost / costs[-1]:.2f}" for cost in costs[:-1]), f"{costs[0] / costs[1]:.2f}"])
    shapes = [len(np.unique(lengths, axis=0)) for lengths in found]
    header = ["", "one common length", "lengths of their own", "one / own"]
    return (f"positions read, over those that the rows need; {config.data.max_length} tokens at most, in multiples of "
            f"{config.data.bucket}\n\n{table(header, lines)}\n\nshapes that a step is compiled for: {shapes[0]} with "
            f"one length, {shapes[1]} with their own, {shapes[2]} if every batch had what it needs")


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        print(benchmark(make(LengthsConfig, cli.given(cli.Section(LengthsConfig), values))))


VERB = cli.Verb(__doc__, (cli.Section(LengthsConfig),), call)

if __name__ == "__main__":
    cli.call("lengths", VERB)
