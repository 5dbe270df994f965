"""Memory by the compiler: of this machine, and of a GPU's where JAX's CUDA plugin is installed."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import memory as benchmark
from experiments.benchmarks import memory_cases
from jaxvaccine import llama, memory, merging
from jaxvaccine.products import einsum_in_full
from tests import tiny

NEEDS_PLUGIN = pytest.mark.skipif(
    not any(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.xla_cuda{n}")
            for n in (12, 13)), reason="JAX's CUDA plugin is not installed")


@pytest.mark.parametrize("card, gib", [("rtx_3090", 24), ("rtx_4090", 24), ("a100_40gb", 40), ("h100_80gb", 80)])
def test_cards(card, gib):
    """A little less than its name says is the program's to use."""
    assert card in memory.CARDS and 0.97 * gib < memory.card_memory(card) / memory.GIB < gib


def test_no_such_card():
    with pytest.raises(ValueError, match="card: found 'rtx_9090', expected one of a100_40gb, "):
        memory.card_device("rtx_9090")


def test_without_the_plugin(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(memory.topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match=r"card rtx_4090: .*topology not implemented.*jax\[cuda12\]"):
        memory.card_device("rtx_4090")


def test_this_machine():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    of = memory.program_memory(jax.jit(lambda x, y: jnp.sort(jnp.sin(x) @ y)), x, x)
    assert of.arguments == 2 * 64 * 64 * 4 and of.temporary >= 64 * 64 * 4


def test_tree_bytes():
    assert memory.tree_bytes({"a": jnp.zeros((3, 2), jnp.bfloat16), "b": jax.ShapeDtypeStruct((5,), jnp.float32)}) == 32


def test_merging_takes_a_layer_at_a_time():
    """Of 16 layers, the weights donated: less than a quarter of one projection's sums."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=16, hidden_size=64, intermediate_size=256)
    model = tiny.model(config=config)
    shapes = llama.tree_shapes(model)
    merge = jax.jit(merging.merge_adapter, static_argnums=0, donate_argnums=2)
    of = merge.lower(model, shapes["lora"], shapes["params"]).compile().memory_analysis()
    assert of.alias_size_in_bytes >= memory.tree_bytes(shapes["params"]["layers"])
    assert of.temp_size_in_bytes < 16 * 64 * 256 * 4 / 4


@NEEDS_PLUGIN
@pytest.mark.long
def test_a_step_of_7b_by_the_gpus_compiler():
    """Four layers of it: what grows with depth is a quarter of what a layer takes."""
    config = dataclasses.replace(benchmark.SIZES["llama-2-7b"], num_layers=4)
    device = memory.card_device("rtx_4090")
    pairs = ("t_vaccine/vaccine", "booster/booster", "booster/sft")
    found = {pair: benchmark.step_memory(of, "bfloat16", config, device)
             for of, pair in benchmark.alignments(pairs, {"remat": "full"}).items()}
    # One pass at a time: Booster holds beside SFT's what three gradients are, and not three sets of boundaries.
    assert found["booster/booster"].temporary < 1.5 * found["booster/sft"].temporary
    assert all(0 <= of.peak - of.frozen - of.state < 1.1 * of.temporary for of in found.values())


@NEEDS_PLUGIN
@pytest.mark.long
@pytest.mark.parametrize("line", [0, 5, 20, 60, -1])
def test_what_the_file_says_is_what_the_compiler_says(line):
    """Of some of the cases beside which the formula is checked; another version of JAX may schedule a little else."""
    case = memory_cases.read()[line]
    found = case.compiled()
    assert found.arguments == case.arguments
    assert found.temporary == pytest.approx(case.temporary, rel=0.15)
    assert found.peak == pytest.approx(case.peak, rel=0.05)


@NEEDS_PLUGIN
def test_no_float32_copy_of_the_head():
    """Of bfloat16's: the gradient of the logits' product, compiled for a GPU."""
    device = memory.card_device("rtx_4090")
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shaped(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    gradient = jax.jit(jax.grad(lambda x, head: jnp.square(einsum_in_full("ND,DV->NV", x, head)).sum()))
    program = gradient.lower(shaped(128, 256), shaped(256, 4096)).compile(compiler_options=memory.OPTIONS).as_text()
    assert re.search(r"f32\[128,4096\]", program) and not re.search(r"f32\[(256,4096|4096,256)\]", program)
