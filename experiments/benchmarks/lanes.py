"""What a training step of many lanes costs: memory, and time a lane, by the number of lanes; random weights.

  python -m experiments.benchmarks.lanes
  python -m experiments.benchmarks.lanes --card=rtx_4090 --model=llama-3.2-1b --dtype=bfloat16

On a CPU lanes take turns, elsewhere they are a batch. With --card the step is compiled for a GPU, which need not be
there (`jaxvaccine.memory`), and not run.
"""

import dataclasses
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks.memory import SIZES, method_of, named_architecture
from jaxvaccine import cli, llama, optim
from jaxvaccine.experiment import lanes
from jaxvaccine.experiment.config import FieldError, Part, field, make, require
from jaxvaccine.experiment.methods import AlignmentMethod, Tar, uses
from jaxvaccine.llama_config import LoraConfig
from jaxvaccine.memory import CARDS, GIB, Memory, card_device, program_memory, tree_bytes
from jaxvaccine.report.tables import table


@dataclasses.dataclass(frozen=True)
class LanesConfig(Part):
    """Benchmark."""

    model: str = field("smollm2", f"{', '.join(SIZES)}, or a folder.")
    method: str = field("sft", "Of the alignment, with settings as t_vaccine:layers=4.")
    lanes: tuple[str, ...] = field(("1", "2", "4", "8", "16"), "Numbers of lanes.")
    rows: int = field(4, "Rows of a lane's batches.", at_least=1)
    length: int = field(64, "Tokens of a row, half of them supervised.", at_least=2)
    rank: int = field(8, "LoRA rank, on all projections.", at_least=1)
    dtype: Literal["bfloat16", "float32"] = field("float32", "Type of the frozen weights.")
    remat: Literal["none", "dots", "full"] = field("full", "What is computed anew for the backward pass.")
    repeats: int = field(3, "Timed steps.", at_least=1)
    card: Literal[("", *CARDS)] = field("", "GPU to compile for, which need not be there; by default this machine.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.lanes) and all(text.isdecimal() and int(text) for text in self.lanes), "lanes", self.lanes,
                "numbers of at least 1")


class Program(NamedTuple):
    """A step of N lanes."""

    init: Any
    step: Any
    backbone: int  # bytes
    memory: Memory
    arguments: tuple[Any, ...]  # ShapeDtypeStructs: adapters, frozen weights, batches, keys, the optimizer's numbers


def program(config: LanesConfig, count: int, device: jax.Device | None = None) -> Program:
    """The step of so many lanes, and its memory by the compiler, of this machine or of the device."""
    method = method_of(config.method)
    if not isinstance(method, AlignmentMethod):
        raise FieldError("method", f"found {config.method!r}, expected one of the alignment")
    model = llama.Llama(named_architecture(config.model), LoraConfig(rank=config.rank), jnp.dtype(config.dtype).type,
                        config.remat)
    turns = None if device is None else False  # what compiles for a GPU here runs on a CPU
    init, step = lanes.compiled(model, method, "adamw", 1, False, turns)
    shapes, tar = llama.tree_shapes(model), uses(method, Tar)

    def of_lanes(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)

    batches = {name: dict.fromkeys(
        ("input_ids", "labels", "attention_mask"),
        jax.ShapeDtypeStruct((config.rows * (tar.inner_steps if name == "adversary" else 1), config.length), jnp.int32))
        for name in method.batches}
    adapters, keys = of_lanes(shapes["lora"]), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    scalars = optim.Scalars(*[jax.ShapeDtypeStruct((), jnp.float32)] * 3)
    arguments = (shapes["params"], of_lanes(batches), keys, scalars)
    of = program_memory(step, jax.eval_shape(init, adapters), *arguments, device=device)
    return Program(init, step, tree_bytes(shapes["params"]), of, (adapters, *arguments))


def seconds(config: LanesConfig, of: Program) -> np.ndarray:
    """Of every timed step, after one that is not counted."""
    rng = np.random.default_rng(0)

    def numbers(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), x.shape[0])
        if x.dtype == jnp.int32:
            return jnp.ones(x.shape, x.dtype)
        return jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype)

    adapters, frozen, batches, keys, scalars = jax.tree.map(numbers, of.arguments)
    half = jnp.where(jnp.arange(config.length) < config.length // 2, -100, 1)
    batches = {name: {**batch, "labels": jnp.broadcast_to(half, batch["labels"].shape)}
               for name, batch in batches.items()}
    state, taken = of.init(adapters), []
    for _ in range(1 + config.repeats):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(of.step(state, frozen, batches, keys, scalars))
        taken.append(time.perf_counter() - started)
    return np.array(taken[1:])


def benchmark(config: LanesConfig) -> str:
    """The Markdown table."""
    device = card_device(config.card) if config.card else None
    lines, first = [], None
    for count in map(int, config.lanes):
        of = program(config, count, device)
        row = [str(count), *(f"{size / GIB:.3f}" for size in (
            of.memory.arguments - of.backbone, of.memory.temporary, of.memory.peak))]
        if device is None:
            a_lane = np.median(seconds(config, of)) / count
            first = first or a_lane
            row += [f"{a_lane:.3f}", f"{a_lane / first:.2f}"]
        lines.append(row)
    header = ["lanes", "states and batches", "temporary", "peak"] + (
        [] if device else ["seconds a lane", "/ the first"])
    where = config.card or jax.devices()[0].platform
    return (f"{config.model}, {config.method}, {config.rows} × {config.length}, {config.dtype}, remat={config.remat}, "
            f"{where}; GiB; the backbone, once: {of.backbone / GIB:.3f}\n\n" + table(header, lines))


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config = make(LanesConfig, cli.given(cli.Section(LanesConfig), values))
        if config.card:
            jax.config.update("jax_platforms", "cpu")  # the plugin would look for its card, and fail without
        print(benchmark(config))


VERB = cli.Verb(__doc__, (cli.Section(LanesConfig),), call)

if __name__ == "__main__":
    cli.call("lanes", VERB)
