"""Sizes of a step, on a model whose parameters can be counted."""

import json

import jax
import pytest

from experiments.benchmarks import memory
from jaxvaccine import llama
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.config import make
from tests import tiny
from tests.experiments import small

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = {"model": "-", "run_dir": "-", "alignment_data": "embedded_refusal@train", "max_length": 8, "batch_size": 2,
         "harmful_data": "embedded_harmful@harmful", "harmful_batch_size": 2}


def test_sizes_of_weights_and_state():
    config = make(AlignConfig, SMALL, {**recipes.alignment("booster", "sft"), "rank": 4})
    shapes = llama.tree_shapes(llama.Llama(tiny.CONFIG, config.adapter.lora()))
    base, adapter = (sum(leaf.size for leaf in jax.tree.leaves(shapes[name])) for name in ("params", "lora"))
    of = memory.step_memory(config, "float32", tiny.CONFIG)
    frozen, state, temporary, _ = (memory.GIB * size for size in of)
    assert frozen == 4 * base and temporary > 0 and of.total == sum(of[:3])
    # Adapter and both moments; the counts of steps are a few bytes a layer.
    assert 0 <= state - 3 * 4 * adapter <= 1000


@pytest.mark.parametrize("name, billions", [
    ("llama-3.2-1b", 1.2358), ("llama-2-7b", 6.7384), ("llama-3-8b", 8.0303), ("llama-2-13b", 13.0159),
    ("gemma-2-9b", 9.2417)])
def test_named_sizes(name, billions):
    """Parameters, as the models' cards and safetensors indices count them."""
    shapes = llama.tree_shapes(llama.Llama(memory.SIZES[name]))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(billions, abs=1e-4)


def test_the_table(monkeypatch):
    """A line for every recipe, as its method and batches are."""
    seen = []

    def step_memory(config, dtype, architecture, device, quantisation):
        seen.append(config.method)
        return memory.StepMemory(12.55, 0.1, float(len(seen)), 23.0 + len(seen) / 4)

    monkeypatch.setattr(memory, "step_memory", step_memory)
    monkeypatch.setattr(memory, "merge_memory", lambda *_: memory.Memory(0, 2**30, 2**31))
    monkeypatch.setattr(memory, "decode_memory", lambda *_: memory.Memory(0, 2**29, 2**35))
    text = memory.benchmark(memory.MemoryConfig(dtype="bfloat16"))
    assert text.startswith("bfloat16, remat=full, compiled for ")
    names = [line.split(" | ")[1] for line in text.splitlines()[4:]]
    # What differs while fine-tuning alone is no line of its own.
    assert names == [*(name for name in recipes.pairs() if name not in ("booster/lisa", "booster/booster+lisa")),
                     "merging", "decoding"]
    assert "| llama-2-7b | booster/sft | 10 × 256 | 12.55 | 0.10 | 1.00 |" in text and len(seen) == len(names) - 2
    seen.clear()
    monkeypatch.setattr(memory, "card_device", str)
    text = memory.benchmark(memory.MemoryConfig(
        model=("llama-2-7b", "gemma-2-9b"), recipes=("t_vaccine/vaccine", "booster/booster"), card="rtx_4090"))
    assert "rtx_4090 (23.5 GiB)" in text.splitlines()[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()[4:]]
    assert [(cell[0], *cell[-2:]) for cell in cells] == [
        ("llama-2-7b", "23.25", "yes"), ("llama-2-7b", "23.50", "yes"), ("llama-2-7b", "2.00", "yes"),
        ("llama-2-7b", "32.00", "no"), ("gemma-2-9b", "23.75", "no"), ("gemma-2-9b", "24.00", "no"),
        ("gemma-2-9b", "2.00", "yes"), ("gemma-2-9b", "32.00", "no")]
    assert cells[3][1:6] == ["decoding", "32 × 288", "12.55", "", "0.50"]


def test_merging_and_decoding():
    """Of the tiny model: arguments are weights, adapter and cache; what is donated is not counted twice."""
    shapes = llama.tree_shapes(llama.Llama(tiny.CONFIG))["params"]
    of = memory.merge_memory(tiny.CONFIG, "float32", None)
    assert of.arguments > memory.tree_bytes(shapes)
    few, many = (memory.decode_memory(tiny.CONFIG, "float32", rows, 32, None) for rows in (2, 4))
    row = 2 * tiny.CONFIG.num_layers * 32 * tiny.CONFIG.num_kv_heads * tiny.CONFIG.head_dim * 4
    assert many.arguments - few.arguments == pytest.approx(2 * row, rel=0.1)


def test_models(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match=r"--model=.*: found no .*config\.json, expected a folder"):
        memory.read_folder(str(folder))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(memory.SIZES["gemma-2-9b"].to_hugging_face()))
    assert memory.read_folder(str(folder)) == memory.SIZES["gemma-2-9b"]


def test_bad_flags():
    with pytest.raises(SystemExit, match="--card"):
        small.call(memory.VERB, "--card=rtx_9090")
    with pytest.raises(SystemExit, match="--model"):
        small.call(memory.VERB, "--model=llama-2-70b")
    with pytest.raises(SystemExit, match="--dtype"):
        small.call(memory.VERB, "--dtype=float8")
