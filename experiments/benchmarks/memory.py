"""Memory of a whole training step on LLaMA-2-7B in the published recipes, from XLA's buffer assignment: nothing is run.

  python -m experiments.benchmarks.memory --dtype=float32

On a CPU, XLA converts bfloat16 weights to float32 copies, which a GPU does not need: there, compile in float32. The
temporary memory of bfloat16 is then about half of what is printed, and the weights are half exactly.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from absl import flags

from jaxvaccine import cli, llama, optim, training
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.config import Part, field, make
from jaxvaccine.experiment.methods import Tar, uses
from jaxvaccine.llama_config import LlamaConfig
from jaxvaccine.report.tables import table

CONFIG = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
                     num_kv_heads=32, head_dim=128, max_position_embeddings=4096)
GIB = 2**30


def step_memory(config: AlignConfig, dtype: str, architecture: LlamaConfig = CONFIG) -> tuple[float, float, float]:
    """GiB of the frozen weights, of adapter and optimizer, and of temporary memory in one step."""
    model = llama.Llama(architecture, config.adapter.lora(), jnp.dtype(dtype).type)
    shapes, defense = llama.tree_shapes(model), config.method.make(model)
    optimizer = optim.layer_masked_adamw(config.training.optimizer(), steps=1000)
    state = jax.eval_shape(lambda adapter: training.init_train_state(adapter, defense, optimizer), shapes["lora"])

    def batch(rows):
        return dict.fromkeys(("input_ids", "labels", "attention_mask"),
                             jax.ShapeDtypeStruct((rows, config.data.max_length), jnp.int32))

    rows, tar = config.data.harmful_batch_size, uses(config.method, Tar)
    batches = {"alignment": batch(config.training.batch_size), "harmful": batch(rows), "harmless": batch(rows),
               "adversary": batch(rows * (tar.inner_steps if tar else 1))}
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = training.make_train_step(defense, optimizer).lower(state, shapes["params"], batches, key).compile()

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / GIB

    return size(shapes["params"]), size(state), compiled.memory_analysis().temp_size_in_bytes / GIB


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Part):
    """Benchmark."""

    dtype: Literal["bfloat16", "float16", "float32"] = field("bfloat16", "Type of the frozen weights.")


def benchmark(config: MemoryConfig) -> str:
    """The Markdown table."""
    anything = {"model": "-", "run_dir": "-", "alignment_data": "embedded_refusal@train",
                "harmful_data": "embedded_harmful@harmful"}
    found: dict[AlignConfig, str] = {}  # methods that differ in the fine-tuning alone share a line
    for pair in recipes.pairs():
        found.setdefault(make(AlignConfig, anything, recipes.alignment(*recipes.parse_pair(pair))), pair)
    rows = []
    for of, pair in found.items():
        sizes = step_memory(of, config.dtype)
        rows.append([pair, f"{of.training.batch_size} × {of.data.max_length}", *(f"{size:.2f}" for size in sizes)])
    return f"{config.dtype}, compiled for {jax.devices()[0].platform}; GiB\n\n" + table(
        ["recipe", "batch", "frozen weights", "adapter and optimizer", "temporary"], rows)


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        print(benchmark(make(MemoryConfig, cli.given(cli.Section(MemoryConfig), values))))


VERB = cli.Verb(__doc__, (cli.Section(MemoryConfig),), call)

if __name__ == "__main__":
    cli.call("memory", VERB)
