"""The formula of memory beside XLA's GPU compiler, on the cases of tests/memory_cases.csv.

  python -m experiments.benchmarks.memory_cases
  python -m experiments.benchmarks.memory_cases --compile

The first reads the compiler's figures from the file and says how far the formula is from them. The second takes them
anew and writes them, ten seconds or more a case; it needs JAX's CUDA plugin, and no GPU.
"""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from experiments.benchmarks.memory import SIZES, decode_memory, method_of
from jaxvaccine import cli, llama
from jaxvaccine.experiment.config import Part, field, make
from jaxvaccine.experiment.memory import Decoding, Step
from jaxvaccine.llama_config import TARGETS, LlamaConfig, LoraConfig
from jaxvaccine.memory import GIB, card_device
from jaxvaccine.report.tables import table

FILE = Path(__file__).parents[2] / "tests" / "memory_cases.csv"
DECODING = "decoding"  # in the place of a method


class Case(NamedTuple):
    """A program, and what the compiler found, in bytes. Of decoding, length is of a row, harmful_rows of a prompt."""

    card: str
    model: str  # of SIZES, or vocabulary, D, F, L, N, K and H with spaces between, "tied" behind them
    method: str  # as of the benchmark's --methods
    rows: int
    harmful_rows: int
    length: int
    dtype: str
    remat: str
    rank: int
    dropout: float
    targets: str
    microbatch_size: int
    attention: str
    arguments: int
    temporary: int
    peak: int

    def program(self) -> Step | Decoding:
        """What has this memory."""
        lora = LoraConfig(self.rank, dropout=self.dropout, targets=tuple(self.targets.split()) or TARGETS)
        model = llama.Llama(architecture(self.model), lora, jnp.dtype(self.dtype).type, remat=self.remat,
                            microbatch_size=self.microbatch_size, attention=self.attention)
        if self.method == DECODING:
            return Decoding(model, self.rows, self.length, self.harmful_rows)
        return Step(model, method_of(self.method), self.rows, self.harmful_rows, self.length)

    def compiled(self) -> "Case":
        """With the compiler's figures."""
        program, device = self.program(), card_device(self.card)
        of = decode_memory(program, device) if isinstance(program, Decoding) else program.compiled(device)
        return self._replace(**of._asdict())


def architecture(text: str) -> LlamaConfig:
    """Of a case's model."""
    if text in SIZES:
        return SIZES[text]
    numbers = text.removesuffix(" tied").split()
    return LlamaConfig(*map(int, numbers), tie_word_embeddings=text.endswith(" tied"))


def read(path: Path = FILE) -> list[Case]:
    """All cases of the file."""
    types = Case.__annotations__
    with path.open(encoding="utf-8", newline="") as file:
        return [Case(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def write(cases: Sequence[Case], path: Path = FILE) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Case._fields)
        writer.writerows(cases)


def errors(case: Case) -> tuple[float, float]:
    """How far the formula is from the compiler: of temporary memory, and of the peak, in parts of the compiler's."""
    of = case.program().estimate()
    # What decoding returns beside its cache is no temporary memory to the compiler, and nothing else holds it.
    return of.temporary / case.temporary - 1, of.peak / case.peak - 1


@dataclasses.dataclass(frozen=True)
class CasesConfig(Part):
    """Benchmark."""

    compile: bool = field(False, "Take the compiler's figures anew, and write them.")


def benchmark(cases: Sequence[Case]) -> str:
    """The Markdown table."""
    lines = []
    for case in cases:
        temporary, peak = errors(case)
        size = f"{case.rows} × {case.length}" + (f" by {case.microbatch_size}" if case.microbatch_size else "")
        lines.append([case.card, case.model, case.method, size, case.dtype, case.remat, case.attention,
                      f"{case.temporary / GIB:.2f}", f"{temporary:+.1%}", f"{case.peak / GIB:.2f}", f"{peak:+.1%}"])
    worst = [max(abs(of) for of in column) for column in zip(*map(errors, cases), strict=True)]
    header = ["card", "model", "method", "batch", "dtype", "remat", "attention", "temporary", "formula", "peak",
              "formula"]
    return table(header, lines) + (f"\n\n{len(cases)} cases; the formula is at most {worst[0]:.1%} from the compiler's "
                                   f"temporary memory and {worst[1]:.1%} from its peak")


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config, cases = make(CasesConfig, cli.given(cli.Section(CasesConfig), values)), read()
    if config.compile:
        jax.config.update("jax_platforms", "cpu")  # the plugin would look for its card, and fail without
        for i, case in enumerate(cases):
            cases[i] = case.compiled()
            print(*cases[i], file=sys.stderr, flush=True)
            write(cases)
    print(benchmark(cases))


VERB = cli.Verb(__doc__, (cli.Section(CasesConfig),), call)

if __name__ == "__main__":
    cli.call("memory_cases", VERB)
