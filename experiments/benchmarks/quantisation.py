"""What quantised weights lose: their error, and next-token distributions against those of the weights in the file.

  python -m experiments.benchmarks.quantisation --model=smollm2 --text=docs/design.md

smollm2 is SmolLM2-135M-Instruct, which comes through the package index (93 MB). Its file holds weights of 4 bits (Q4_1,
blocks of 32): what is measured is what a second rounding adds.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from jaxvaccine import cli, llama
from jaxvaccine.checkpoints import hugging_face, smollm2
from jaxvaccine.data import load_tokenizer
from jaxvaccine.experiment.config import Part, field, make, require
from jaxvaccine.memory import tree_bytes
from jaxvaccine.quantisation import KINDS, Quantised, dequantise
from jaxvaccine.report.tables import table


@dataclasses.dataclass(frozen=True)
class QuantisationConfig(Part):
    """Benchmark."""

    model: str = field("smollm2", "smollm2, or a Hugging Face directory, a hub id or a .gguf file.")
    text: str = field("", "File of plain text.")
    dtype: Literal["float32", "bfloat16"] = field("float32", "Type of the computation and of what is not quantised.")
    tokens: int = field(4096, "How many of the text's tokens are read, rounded down to whole rows.", at_least=2)
    length: int = field(256, "Tokens of a row.", at_least=2)

    def __post_init__(self):
        super().__post_init__()
        require(Path(self.text).is_file(), "text", self.text, "a file")


class Loss(NamedTuple):
    """Means over the predicted tokens."""

    cross_entropy: float  # nats
    kl: float  # of the weights in the file and the quantised ones, nats
    agree: float  # part of the tokens where both find the same one most likely


def weight_error(full, quantised) -> tuple[float, float]:
    """(‖W − Ŵ‖ / ‖W‖ over all quantised kernels, bits a weight with the scales), layer by layer in float64."""
    off = size = count = bits = 0.0
    for name, kernel in jax.tree_util.tree_leaves_with_path(quantised, is_leaf=lambda x: isinstance(x, Quantised)):
        if not isinstance(kernel, Quantised):
            continue
        whole = functools.reduce(lambda tree, key: tree[key.key], name, full)
        for layer in range(len(whole)):
            weights = np.asarray(whole[layer], np.float64)
            found = np.asarray(dequantise(jax.tree.map(lambda x, i=layer: x[i], kernel), jnp.float32), np.float64)
            off, size, count = off + ((weights - found) ** 2).sum(), size + (weights**2).sum(), count + weights.size
        bits += 8 * tree_bytes(kernel)
    return (off / size) ** 0.5, bits / count


def losses(model: llama.Llama, full, quantised, rows_RxT: np.ndarray) -> Loss:
    """Of the tokens of every row but its first, a row at a time."""
    @jax.jit
    def of_row(full, quantised, row_1xT):
        def log_p(frozen):
            hidden = llama.hidden_states(model, None, frozen, row_1xT, jnp.ones_like(row_1xT))
            return jax.nn.log_softmax(llama.token_logits(model, frozen, hidden[0, :-1]))

        expected, found = log_p(full), log_p(quantised)
        return (-jnp.take_along_axis(found, row_1xT[0, 1:, None], axis=-1).mean(),
                optax.losses.kl_divergence_with_log_targets(found, expected).mean(),
                (found.argmax(-1) == expected.argmax(-1)).mean())

    return Loss(*np.mean([jax.device_get(of_row(full, quantised, row[None])) for row in rows_RxT], axis=0).tolist())


def benchmark(config: QuantisationConfig) -> str:
    """The Markdown table."""
    directory = smollm2.fetch() if config.model == "smollm2" else hugging_face.resolve_model(config.model)
    ids = load_tokenizer(directory)(Path(config.text).read_text(encoding="utf-8"))["input_ids"][:config.tokens]
    require(len(ids) >= config.length, "text", config.text, f"at least {config.length} tokens")
    rows = np.asarray(ids[:len(ids) // config.length * config.length], np.int32).reshape(-1, config.length)
    model, full = hugging_face.load_model(directory, dtype=config.dtype)
    lines = []
    for kind in ("none", *KINDS):
        quantised = full if kind == "none" else hugging_face.load_model(
            directory, dtype=config.dtype, quantisation=kind)[1]
        error, bits = weight_error(full, quantised) if kind != "none" else (0.0, 8.0 * jnp.dtype(config.dtype).itemsize)
        of = losses(model, full, quantised, rows)
        lines.append([kind, f"{bits:.2f}", f"{100 * error:.2f}", f"{of.cross_entropy:.4f}",
                      f"{np.exp(of.cross_entropy):.2f}", f"{of.kl:.4f}", f"{100 * of.agree:.1f}"])
    return f"{config.dtype}, {rows.size} tokens of {config.text} in rows of {config.length}\n\n" + table(
        ["quantisation", "bits a weight", "‖W − Ŵ‖ / ‖W‖ %", "loss, nats a token", "perplexity",
         "KL to the file's weights, nats a token", "same most likely token %"], lines)


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        print(benchmark(make(QuantisationConfig, cli.given(cli.Section(QuantisationConfig), values))))


VERB = cli.Verb(__doc__, (cli.Section(QuantisationConfig),), call)

if __name__ == "__main__":
    cli.call("quantisation", VERB)
