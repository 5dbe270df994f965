"""Memory of training steps in the papers' recipes, of merging and decoding, by XLA's buffer assignment: nothing is run.

  python -m experiments.benchmarks.memory --card=rtx_4090
  python -m experiments.benchmarks.memory --card=rtx_4090 --model=llama-3-8b,models/mine

With --card it is the GPU compiler's, without any GPU (`jaxvaccine.memory`): that needs JAX's CUDA plugin, and takes
half a minute to two minutes a line. Without, it is this machine's; on a CPU, XLA converts bfloat16 weights to float32
copies, which a GPU does not need: there, compile in float32. The temporary memory of bfloat16 is then about half of
what is printed, and the weights are half exactly.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from jaxvaccine import cli, llama, merging, optim, training
from jaxvaccine.evaluation import decoding
from jaxvaccine.evaluation.generate import BLOCK
from jaxvaccine.evaluation.sampling import Sampling
from jaxvaccine.experiment import recipes, stage
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.config import Part, field, make
from jaxvaccine.experiment.methods import Tar, uses
from jaxvaccine.llama_config import Llama3RopeScaling, LlamaConfig, LoraConfig
from jaxvaccine.memory import CARDS, GIB, Memory, card_device, card_memory, program_memory, tree_bytes
from jaxvaccine.quantisation import Kind, quantise_kernels
from jaxvaccine.report.tables import table

# As in the config.json of their first publication.
SIZES = {
    "llama-3.2-1b": LlamaConfig(
        128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 500000.0, Llama3RopeScaling(32.0, 1.0, 4.0, 8192), 131072, True),
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 1e-5, max_position_embeddings=4096),
    "llama-3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 500000.0, max_position_embeddings=8192),
    "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128, 1e-5, max_position_embeddings=4096),
    "gemma-2-9b": LlamaConfig(
        256000, 3584, 14336, 42, 16, 8, 256, 1e-6, max_position_embeddings=8192, tie_word_embeddings=True,
        model_type="gemma2", sliding_window=4096, sliding_layers=(True, False) * 21, query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
}


class StepMemory(NamedTuple):
    """GiB of a step."""

    frozen: float  # weights
    state: float  # adapter and optimizer
    temporary: float
    peak: float  # of all

    @property
    def total(self) -> float:
        """Weights, state and temporary memory."""
        return self.frozen + self.state + self.temporary


def step_memory(config: AlignConfig, dtype: str, architecture: LlamaConfig, device: jax.Device | None = None,
                quantisation: Kind = "none") -> StepMemory:
    """Memory of one step of an alignment.

    Args:
      config: of the alignment; its model is not read.
      dtype: of the frozen weights.
      architecture: the model.
      device: which it is compiled for, as of `memory.card_device`; None is this machine's.
      quantisation: of the frozen weights.
    """
    model = llama.Llama(architecture, config.adapter.lora(), jnp.dtype(dtype).type, remat=config.model.remat)
    shapes, defense = llama.tree_shapes(model), config.method.make(model)
    shapes["params"] = jax.eval_shape(functools.partial(quantise_kernels, kind=quantisation), shapes["params"])
    optimizer = optim.layer_masked_adamw(config.training.optimizer(), steps=1000)
    state = jax.eval_shape(lambda adapter: training.init_train_state(adapter, defense, optimizer), shapes["lora"])

    def batch(rows):
        return dict.fromkeys(("input_ids", "labels", "attention_mask"),
                             jax.ShapeDtypeStruct((rows, config.data.max_length), jnp.int32))

    rows, tar = config.data.harmful_batch_size, uses(config.method, Tar)
    batches = {"alignment": batch(config.training.batch_size), "harmful": batch(rows), "harmless": batch(rows),
               "adversary": batch(rows * (tar.inner_steps if tar else 1))}
    key = jax.eval_shape(lambda: jax.random.key(0))
    of = program_memory(training.make_train_step(defense, optimizer), state, shapes["params"], batches, key,
                        device=device)
    sizes = (tree_bytes(shapes["params"]), tree_bytes(state), of.temporary, of.peak)
    return StepMemory(*(size / GIB for size in sizes))


def merge_memory(architecture: LlamaConfig, dtype: str, device: jax.Device | None) -> Memory:
    """Memory of merging an adapter of rank 32 on all projections."""
    model = llama.Llama(architecture, LoraConfig(rank=32), jnp.dtype(dtype).type)
    shapes = llama.tree_shapes(model)
    merge = jax.jit(functools.partial(merging.merge_adapter, model), donate_argnums=1)
    return program_memory(merge, shapes["lora"], shapes["params"], device=device)


def decode_memory(architecture: LlamaConfig, dtype: str, rows: int, positions: int, device: jax.Device | None,
                  quantisation: Kind = "none") -> Memory:
    """Memory of a block of decoding, with room for so many positions, prompt and answer, in each row."""
    model = llama.Llama(architecture, None, jnp.dtype(dtype).type)
    given = jax.eval_shape(functools.partial(
        decoding.empty, model, batch=rows, capacity=positions, max_new_tokens=positions))
    decode = jax.jit(lambda frozen, eos, rows, cache: decoding.decode(
        model, None, frozen, (), eos, rows, cache, steps=BLOCK, sampling=Sampling()), donate_argnums=(2, 3))
    frozen = jax.eval_shape(functools.partial(quantise_kernels, kind=quantisation), llama.tree_shapes(model)["params"])
    return program_memory(decode, frozen, jax.ShapeDtypeStruct((1,), jnp.int32), *given,
                          device=device)


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Part):
    """Benchmark."""

    model: tuple[str, ...] = field(
        ("llama-2-7b",), f"Models: {', '.join(SIZES)}, or folders with a config.json.")
    recipes: tuple[str, ...] = field((), "(paper, method) pairs, such as booster/vaccine; by default all.")
    dtype: Literal["bfloat16", "float16", "float32"] = field("bfloat16", "Type of the frozen weights.")
    quantisation: Kind = field("none", "In what the layers' frozen matrices are kept.")
    remat: Literal["none", "dots", "full"] = field("full", "What is computed anew for the backward pass.")
    rows: int = field(32, "Rows that are decoded together.", at_least=1)
    positions: int = field(288, "Positions of a row, prompt and answer.", at_least=1)
    card: Literal[("", *CARDS)] = field("", "GPU to compile for, which need not be there; by default this machine.")


def alignments(pairs: tuple[str, ...], remat: str) -> dict[AlignConfig, str]:
    """{the alignment: the first pair whose it is}: methods that differ in the fine-tuning alone share one."""
    anything = {"model": "-", "run_dir": "-", "alignment_data": "embedded_refusal@train",
                "harmful_data": "embedded_harmful@harmful", "remat": remat}
    found: dict[AlignConfig, str] = {}
    for pair in pairs or recipes.pairs():
        found.setdefault(make(AlignConfig, anything, recipes.alignment(*recipes.parse_pair(pair))), pair)
    return found


def read_folder(model: str) -> LlamaConfig:
    """The architecture of a local folder; the hub's would come with all of its weights.

    Raises:
      ValueError: there is no config.json in it, or one of no supported family.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ValueError(f"--model={model}: found no {path}, expected a folder with a config.json, or one of "
                         f"{', '.join(SIZES)}")
    return stage.read_architecture(model)


def lines(config: MemoryConfig) -> Iterator[list[str]]:
    """Rows of the table."""
    device = card_device(config.card) if config.card else None

    def line(model: str, program: str, batch: str, sizes: Sequence[float | None], peak: float) -> list[str]:
        row = [model, program, batch, *("" if size is None else f"{size:.2f}" for size in sizes)]
        if device is not None:
            row += [f"{peak:.2f}", "yes" if peak * GIB < card_memory(config.card) else "no"]
        print(*row, file=sys.stderr, flush=True)
        return row

    for model in config.model:
        architecture = SIZES.get(model) or read_folder(model)
        shapes = llama.tree_shapes(llama.Llama(architecture, None, jnp.dtype(config.dtype).type))["params"]
        frozen = tree_bytes(jax.eval_shape(functools.partial(quantise_kernels, kind=config.quantisation), shapes))
        for of, pair in alignments(config.recipes, config.remat).items():
            step = step_memory(of, config.dtype, architecture, device, config.quantisation)
            yield line(model, pair, f"{of.training.batch_size} × {of.data.max_length}", step[:3], step.peak)
        merging = [("merging", "", merge_memory(architecture, config.dtype, device))] * (config.quantisation == "none")
        for program, batch, of in (
                *merging,
                ("decoding", f"{config.rows} × {config.positions}", decode_memory(
                    architecture, config.dtype, config.rows, config.positions, device, config.quantisation))):
            yield line(model, program, batch, (frozen / GIB, None, of.temporary / GIB), of.peak / GIB)


def benchmark(config: MemoryConfig) -> str:
    """The Markdown table."""
    header = ["model", "step of, or program", "batch", "frozen weights", "adapter and optimizer", "temporary"]
    target = jax.devices()[0].platform
    if config.card:
        header += ["peak", "below the card's memory"]
        target = f"{config.card} ({card_memory(config.card) / GIB:.1f} GiB)"
    quantised = "" if config.quantisation == "none" else f", {config.quantisation}"
    return (f"{config.dtype}{quantised}, remat={config.remat}, compiled for {target}; GiB\n\n"
            + table(header, list(lines(config))))


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config = make(MemoryConfig, cli.given(cli.Section(MemoryConfig), values))
        if config.card:
            jax.config.update("jax_platforms", "cpu")  # the plugin would look for its card, and fail without
        print(benchmark(config))


VERB = cli.Verb(__doc__, (cli.Section(MemoryConfig),), call)

if __name__ == "__main__":
    cli.call("memory", VERB)
