"""Memory of a whole training step on LLaMA-2-7B in the published recipes, from XLA's buffer assignment: nothing is run.

  python -m experiments.benchmark_memory --dtype=float32

On a CPU, XLA converts bfloat16 weights to float32 copies, which a GPU does not need: there, compile in float32. The
temporary memory of bfloat16 is then about half of what is printed, and the weights are half exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import presets
from experiments.align import AlignConfig, make_defense
from experiments.common import lora_of
from experiments.reports import table
from jaxvaccine import llama, optim, training
from jaxvaccine.llama_config import LlamaConfig

CONFIG = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
                     num_kv_heads=32, head_dim=128, max_position_embeddings=4096)
GIB = 2**30


def step_memory(config: AlignConfig, dtype: str, architecture: LlamaConfig = CONFIG) -> tuple[float, float, float]:
    """GiB of the frozen weights, of adapter and optimizer, and of temporary memory in one step."""
    model = llama.Llama(architecture, lora_of(config), jnp.dtype(dtype).type)
    shapes, defense = llama.tree_shapes(model), make_defense(config)(model)
    optimizer = optim.layer_masked_adamw(config.optimizer(), steps=1000)
    state = jax.eval_shape(lambda adapter: training.init_train_state(adapter, defense, optimizer), shapes["lora"])

    def batch(rows):
        return dict.fromkeys(("input_ids", "labels", "attention_mask"),
                             jax.ShapeDtypeStruct((rows, config.max_length), jnp.int32))

    rows = config.harmful_batch_size
    batches = {"alignment": batch(config.batch_size), "harmful": batch(rows), "harmless": batch(rows),
               "adversary": batch(rows * config.inner_steps)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = training.make_train_step(defense, optimizer).lower(state, shapes["params"], batches, key).compile()

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / GIB

    return size(shapes["params"]), size(state), compiled.memory_analysis().temp_size_in_bytes / GIB


def main(argv: list[str]) -> None:
    del argv
    anything = {"model": "-", "run_dir": "-", "alignment_data": "embedded_refusal@train",
                "harmful_data": "embedded_harmful@harmful"}
    rows = []
    for name, preset in presets.ALIGN.items():
        config = dataclasses.replace(AlignConfig(**anything), **preset)
        sizes = step_memory(config, flags.FLAGS.dtype)
        rows.append([name, f"{config.batch_size} × {config.max_length}", *(f"{size:.2f}" for size in sizes)])
    print(f"{flags.FLAGS.dtype}, compiled for {jax.devices()[0].platform}; GiB\n")
    print(table(["recipe", "batch", "frozen weights", "adapter and optimizer", "temporary"], rows))


if __name__ == "__main__":
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Type of the frozen weights.")
    app.run(main)
