"""What training steps, merging and decoding take of a GPU's memory, whether a card has it, and the largest batch.

  python -m experiments.benchmarks.memory --card=rtx_4090
  python -m experiments.benchmarks.memory --card=rtx_4090 --model=models/mine --methods=vaccine,t_vaccine:layers=4
  python -m experiments.benchmarks.memory --card=rtx_4090 --by=formula --methods=all \\
      --model=llama-3.2-1b,llama-2-7b,llama-3-8b,llama-2-13b

Where the bytes go is by the formula (`jaxvaccine.memory_model`), which takes no time. With --card and JAX's CUDA plugin
the temporary memory and the peak are the GPU compiler's own, without any GPU (`jaxvaccine.memory`): ten seconds or more
a line. --by=compiler without --card compiles for this machine; on a CPU, XLA converts bfloat16 weights to float32
copies, which a GPU does not need: there, compile in float32.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from jaxvaccine import cli, llama, memory_model, merging
from jaxvaccine.evaluation import decoding
from jaxvaccine.evaluation.generate import BLOCK, SMALLEST, joining
from jaxvaccine.evaluation.sampling import Sampling
from jaxvaccine.experiment import memory, recipes, stage
from jaxvaccine.experiment.align import AlignConfig, step_of
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import FieldError, Part, field, make, parse
from jaxvaccine.experiment.memory import Decoding, Step, Target
from jaxvaccine.experiment.methods import ALIGNMENT, FINE_TUNING, AlignmentMethod, TuningMethod
from jaxvaccine.experiment.parts import COMPUTED
from jaxvaccine.llama_config import Llama3RopeScaling, LlamaConfig, LoraConfig
from jaxvaccine.memory import CARDS, GIB, Memory, card_device, program_memory, tree_bytes
from jaxvaccine.quantisation import Kind
from jaxvaccine.report.tables import table

# As in the config.json of their first publication.
SIZES = {
    "smollm2": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, tie_word_embeddings=True),
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
ALL = (*ALIGNMENT, *(f"booster:base_defense={base}" for base in ("vaccine", "t_vaccine", "repnoise", "tar")),
       *(name for name in FINE_TUNING if name != "none"))
COMPUTATION = (*COMPUTED, "quantisation")  # of both configs
# What a config needs and a step does not read.
ANYTHING = {"model": "-", "run_dir": "-", "alignment_data": "embedded_refusal@train",
            "harmful_data": "embedded_harmful@harmful", "aligned": "-", "user_data": "embedded_refusal@train"}


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


def step_memory(config: AlignConfig, dtype: str, architecture: LlamaConfig, device: jax.Device | None = None
                ) -> StepMemory:
    """Memory of one step of an alignment, by the compiler.

    Args:
      config: of the alignment; its model is not read.
      dtype: of the frozen weights.
      architecture: the model.
      device: which it is compiled for, as of `memory.card_device`; None is this machine's.
    """
    step = step_of(config, llama.Llama(architecture, dtype=jnp.dtype(dtype).type), config.data.max_length)
    of = step.compiled(device)
    weights, _ = memory_model.weights(step.model, step.quantisation)
    return StepMemory(*(size / GIB for size in (weights, tree_bytes(step.state()), of.temporary, of.peak)))


def merge_memory(architecture: LlamaConfig, dtype: str, device: jax.Device | None) -> Memory:
    """Memory of merging an adapter of rank 32 on all projections, by the compiler."""
    model = _with_adapter(architecture, dtype)
    shapes = llama.tree_shapes(model)
    merge = jax.jit(functools.partial(merging.merge_adapter, model), donate_argnums=1)
    return program_memory(merge, shapes["lora"], shapes["params"], device=device)


def _with_adapter(architecture: LlamaConfig, dtype: str) -> llama.Llama:
    return llama.Llama(architecture, LoraConfig(rank=32), jnp.dtype(dtype).type)


def decode_memory(of: Decoding, device: jax.Device | None) -> Memory:
    """Memory of generation, by the compiler: of decoding a block, reading prompts and going on with half of the rows,
    whichever takes most."""
    model, shapes = of.model.clone(remat="none"), of.shapes()
    frozen, adapter, eos = shapes["params"], shapes.get("lora"), _ints(1)
    given = jax.eval_shape(functools.partial(
        decoding.empty, model, batch=of.rows, capacity=of.positions, max_new_tokens=of.positions))
    decode = jax.jit(lambda frozen, adapter, eos, rows, cache: decoding.decode(
        model, adapter, frozen, (), eos, rows, cache, steps=BLOCK, sampling=Sampling()), donate_argnums=(3, 4))
    admit = jax.jit(lambda frozen, adapter, eos, rows, cache, *new: decoding.admit(
        model, adapter, frozen, (), eos, rows, cache, *new, sampling=Sampling()), donate_argnums=(3, 4))
    keep = jax.jit(functools.partial(decoding.keep, capacity=of.positions))
    group = joining(of.rows)
    found = [program_memory(decode, frozen, adapter, eos, *given, device=device),
             program_memory(admit, frozen, adapter, eos, *given, _ints(group, of.prompt), *[_ints(group)] * 3,
                            device=device)]
    half = program_memory(keep, *given, _ints(memory_model.kept_rows(of.rows, SMALLEST)), device=device)
    beside = tree_bytes((frozen, adapter))  # are there meanwhile
    found.append(Memory(beside + half.arguments, half.peak - half.arguments, beside + half.peak))
    return max(found, key=lambda of: of.peak)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Part):
    """Benchmark."""

    model: tuple[str, ...] = field(
        ("llama-2-7b",), f"Models: {', '.join(SIZES)}, or folders with a config.json.")
    recipes: tuple[str, ...] = field((), "(paper, method) pairs, such as booster/vaccine; by default all.")
    methods: tuple[str, ...] = field(
        (), "Instead of the recipes: methods of both stages, with settings as t_vaccine:layers=4; all.")
    batch_size: int = field(10, "--methods: rows of every batch.", at_least=1)
    max_length: int = field(256, "--methods: tokens of a row.", at_least=1)
    rank: int = field(8, "--methods: LoRA rank, on all projections.", at_least=1)
    dtype: Literal["bfloat16", "float16", "float32"] = field("bfloat16", "Type of the frozen weights.")
    quantisation: Kind = field("none", "In what the layers' frozen matrices are kept.")
    remat: Literal["none", "dots", "full"] = field("full", "What is computed anew for the backward pass.")
    microbatch_size: int = field(0, "Rows computed at a time; 0 is all.", at_least=0)
    attention: Literal["xla", "cudnn"] = field("xla", "Whose attention.")
    rows: int = field(32, "Rows that are decoded together.", at_least=1)
    positions: int = field(288, "Positions of a row, prompt and answer.", at_least=1)
    prompt: int = field(96, "Of these, a prompt's, padded.", at_least=1)
    card: Literal[("", *CARDS)] = field("", "The GPU, which need not be there.")
    by: Literal["auto", "formula", "compiler"] = field(
        "auto", "Temporary memory and peak: auto takes the compiler's where it can compile for the card.")


def alignments(pairs: tuple[str, ...], computation: Mapping[str, Any]) -> dict[AlignConfig, str]:
    """{the alignment: the first pair whose it is}: methods that differ in the fine-tuning alone share one.

    computation: of `COMPUTATION`.
    """
    found: dict[AlignConfig, str] = {}
    for pair in pairs or recipes.pairs():
        anything = {name: ANYTHING[name] for name in ("model", "run_dir", "alignment_data", "harmful_data")}
        found.setdefault(make(AlignConfig, {**anything, **computation},
                              recipes.alignment(*recipes.parse_pair(pair))), pair)
    return found


def method_of(text: str) -> AlignmentMethod | TuningMethod:
    """A method of either stage: its name, and settings behind colons.

    Raises:
      FieldError: no such method, or what its config refuses.
    """
    name, *settings = text.split(":")
    if name not in {**ALIGNMENT, **FINE_TUNING}:
        raise FieldError("methods", f"found {name!r}, expected one of {', '.join((*ALIGNMENT, *FINE_TUNING))}")
    stage_config = AlignConfig if name in ALIGNMENT else AttackConfig
    given = parse(stage_config, dict(setting.partition("=")[::2] for setting in settings))
    return make(stage_config, {**given, "defense": name}, {**ANYTHING, "poison_ratio": 0.0}).method


def named_architecture(model: str) -> LlamaConfig:
    """One of SIZES, or that of a local folder; raises as `read_folder`."""
    return SIZES.get(model) or read_folder(model)


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


HEADER = ("model", "step of, or program", "batch", "frozen weights", "adapter and optimizer", "kept of layers",
          "perturbations", "gradients", "layer or logits", "temporary", "peak")
OF_CARD = ("fits", "largest batch", "or else")


def lines(config: MemoryConfig, compile_for: jax.Device | None, compiles: bool) -> Iterator[list[str]]:
    """Rows of the table. compile_for: as of `program_memory`, where it compiles at all."""
    target = memory.card(config.card) if config.card else None

    def line(model: str, program: str, batch: str, of: memory_model.Memory, compiled: Memory | None,
             largest: int = 0, helpful: tuple[str, int, bool] | None = None) -> list[str]:
        peak = compiled.peak if compiled else of.peak
        sizes = (of.weights, of.adapter + of.optimizer, of.boundaries + of.cache, of.perturbations, of.gradients,
                 max(of.layer, of.logits), compiled.temporary if compiled else of.temporary, peak)
        row = [model, program, batch, *(f"{size / GIB:.2f}" if size else "" for size in sizes)]
        if target:
            flag = f"{helpful[0]}: {helpful[1] / GIB:.2f}" + ("" if helpful[2] else ", too much") if helpful else ""
            row += ["yes" if peak <= target.largest else "no", str(largest) if largest else "", flag]
        print(*row, file=sys.stderr, flush=True)
        return row

    def of_step(model: str, program: str, step: Step, bucket: int) -> list[str]:
        room = target.largest if target else 0
        found = step.estimate()
        return line(model, program, f"{step.rows} × {step.length}", found,
                    step.compiled(compile_for) if compiles else None, memory.largest_batch(step, room) if room else 0,
                    memory.helpful_flag(step, room, bucket) if room and found.peak > room else None)

    for model in config.model:
        architecture = named_architecture(model)
        if config.methods:
            for text in ALL if config.methods == ("all",) else config.methods:
                adapted = llama.Llama(architecture, LoraConfig(config.rank), jnp.dtype(config.dtype).type, config.remat,
                                      microbatch_size=config.microbatch_size, attention=config.attention)
                yield of_step(model, text, Step(adapted, method_of(text), config.batch_size, config.batch_size,
                                                config.max_length, config.quantisation), 64)
        else:
            for of, pair in alignments(config.recipes, {name: getattr(config, name) for name in COMPUTATION}).items():
                base = llama.Llama(architecture, dtype=jnp.dtype(config.dtype).type)
                yield of_step(model, pair, step_of(of, base, of.data.max_length), of.data.bucket)
        if config.quantisation == "none":  # beside quantised weights an adapter is frozen
            yield line(model, "merging", "", memory_model.merge(_with_adapter(architecture, config.dtype)),
                       merge_memory(architecture, config.dtype, compile_for) if compiles else None)
        of = Decoding(llama.Llama(architecture, None, jnp.dtype(config.dtype).type), config.rows, config.positions,
                      min(config.prompt, config.positions), config.quantisation)
        yield line(model, "decoding", f"{config.rows} × {config.positions}", of.estimate(),
                   decode_memory(of, compile_for) if compiles else None, _most_rows(of, target) if target else 0)


def _most_rows(of: Decoding, target: Target) -> int:
    return memory.largest_decoding(of, of.beside(target.largest))


def benchmark(config: MemoryConfig) -> str:
    """The Markdown table."""
    device, compiles = None, config.by == "compiler"
    if config.card and config.by != "formula":
        try:
            device, compiles = card_device(config.card), True
        except ValueError:
            if config.by == "compiler":
                raise
    target = f"{config.card} ({memory.card(config.card).total / GIB:.1f} GiB)" if config.card else "this machine"
    said = f"compiled for {target}" if compiles else f"by the formula, for {(config.card and target) or 'any GPU'}"
    header = [*HEADER, *(OF_CARD if config.card else ())]
    how = ", ".join(f"{name}={getattr(config, name)}" for name in COMPUTATION
                    if name == "remat" or getattr(config, name) not in (0, "xla", "none"))
    return f"{config.dtype}, {how}, {said}; GiB\n\n" + table(
        header, list(lines(config, device, compiles)))


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config = make(MemoryConfig, cli.given(cli.Section(MemoryConfig), values))
        if config.card:
            jax.config.update("jax_platforms", "cpu")  # the plugin would look for its card, and fail without
        print(benchmark(config))


VERB = cli.Verb(__doc__, (cli.Section(MemoryConfig),), call)

if __name__ == "__main__":
    cli.call("memory", VERB)
