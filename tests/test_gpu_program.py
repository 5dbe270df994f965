"""The program that a GPU would run, read in XLA's own words: where JAX's CUDA plugin is installed."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.step import methods
from jaxvaccine import llama, memory, optim, training
from jaxvaccine.llama_config import LlamaConfig, LoraConfig
from tests.test_memory import NEEDS_PLUGIN

# Sizes that are found nowhere else, so that a shape says what it is of.
CONFIG = LlamaConfig(vocab_size=4160, hidden_size=256, intermediate_size=640, num_layers=3, num_heads=4, num_kv_heads=2,
                     head_dim=64, rms_norm_eps=1e-5)
ROWS, LENGTH = 6, 96
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = \(?(\w+)\[([\d,]*)\]\S* .*?([\w-]+)\(([^)]*)\)")


@functools.cache
def program(name: str) -> str:
    model = llama.Llama(CONFIG, LoraConfig(rank=8), jnp.bfloat16)
    shapes, defense = llama.tree_shapes(model), methods(model)[name]
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(), 1000)
    state = jax.eval_shape(lambda adapter: training.init_train_state(adapter, defense, optimizer), shapes["lora"])
    batches = {kind: dict.fromkeys(("input_ids", "labels", "attention_mask"),
                                   jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32))
               for kind, rows in {**dict.fromkeys(("alignment", "harmful", "harmless", "user"), ROWS),
                                  "adversary": 4 * ROWS}.items()}
    sharding = jax.sharding.SingleDeviceSharding(memory.card_device("rtx_4090"))
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (
        state, shapes["params"], batches, jax.eval_shape(lambda: jax.random.key(0))))
    return training.make_train_step(defense, optimizer).lower(*arguments).compile(
        compiler_options=memory.OPTIONS).as_text()


def instructions(text: str):
    """(name, dtype, shape, operation, names of its operands, the line) of every instruction."""
    for line in text.splitlines():
        if found := INSTRUCTION.match(line):
            name, dtype, shape, operation, operands = found.groups()
            yield (name, dtype, tuple(map(int, filter(None, shape.split(",")))), operation,
                   re.findall(r"%([\w.-]+)", operands), line)


@NEEDS_PLUGIN
@pytest.mark.long
@pytest.mark.parametrize("name", ["sft", "vaccine", "t_vaccine", "booster", "tar", "repnoise", "kl, while fine-tuning"])
def test_a_step(name):
    found = list(instructions(program(name)))
    types = {of[0]: of[1] for of in found}
    products = [of for of in found if "matmul" in of[5] or "gemm" in of[5] or of[3] == "dot"]
    assert len(products) > 50
    # RepNoise's distances are differences of large numbers, and are asked for in full: [2 B, 2 B] and their gradient.
    in_full = [line for *_, operands, line in products if any(types.get(operand) == "f32" for operand in operands[:2])]
    assert name == "repnoise" or not in_full, in_full[:3]
    assert all(f"[{2 * ROWS}," in line for line in in_full), in_full[:3]
    for _, dtype, shape, operation, _, line in found:
        size = math.prod(shape)
        assert not (CONFIG.vocab_size in shape and size >= ROWS * LENGTH * CONFIG.vocab_size), line
        # Layers' weights, stacked, are parameters and are passed on; nothing makes others of them.
        stacked = dtype == "bf16" and len(shape) == 3 and shape[0] == CONFIG.num_layers and ROWS * LENGTH not in shape
        if stacked and operation in ("fusion", "copy", "transpose", "convert"):
            assert size < CONFIG.num_layers * CONFIG.hidden_size * 2 * CONFIG.head_dim, line
