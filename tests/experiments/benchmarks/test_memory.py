"""Sizes of a step, on a model whose parameters can be counted."""

import json

import jax
import pytest

from experiments.benchmarks import memory
from jaxvaccine import llama
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.config import FieldError, make
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

    def compiled(step, device):
        seen.append(step.method)
        return memory.Memory(0, len(seen) * 2**30, 23 * 2**30 + len(seen) * 2**27)

    monkeypatch.setattr(memory.Step, "compiled", compiled)
    monkeypatch.setattr(memory, "merge_memory", lambda *_: memory.Memory(0, 2**30, 2**31))
    monkeypatch.setattr(memory, "decode_memory", lambda *_: memory.Memory(0, 2**29, 2**35))
    text = memory.benchmark(memory.MemoryConfig(dtype="bfloat16", by="compiler"))
    assert text.startswith("bfloat16, remat=full, compiled for this machine")
    names = [line.split(" | ")[1] for line in text.splitlines()[4:]]
    # What differs while fine-tuning alone is no line of its own.
    assert names == [*(name for name in recipes.pairs() if name not in ("booster/lisa", "booster/booster+lisa")),
                     "merging", "decoding"]
    assert "| llama-2-7b | booster/sft | 10 × 256 | 12.55 | 0.28 | 0.62 |" in text and len(seen) == len(names) - 2
    assert text.splitlines()[4].endswith(" | 1.00 | 23.12 |"), "the compiler's"
    seen.clear()
    monkeypatch.setattr(memory, "card_device", str)
    text = memory.benchmark(memory.MemoryConfig(
        model=("llama-2-7b", "gemma-2-9b"), recipes=("t_vaccine/vaccine", "booster/booster"), card="rtx_4090"))
    assert "rtx_4090 (23.5 GiB)" in text.splitlines()[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()[4:]]
    # CUDA's own half is not the program's.
    assert [(cell[0], *cell[10:12]) for cell in cells] == [
        ("llama-2-7b", "23.12", "no"), ("llama-2-7b", "23.25", "no"), ("llama-2-7b", "2.00", "yes"),
        ("llama-2-7b", "32.00", "no"), ("gemma-2-9b", "23.38", "no"), ("gemma-2-9b", "23.50", "no"),
        ("gemma-2-9b", "2.00", "yes"), ("gemma-2-9b", "32.00", "no")]
    assert cells[3][1:6] == ["decoding", "32 × 288", "12.55", "", "4.50"] and cells[3][9] == "0.50"


def test_the_table_by_the_formula():
    """Of every method of both stages, without compiling anything; what does not fit has a flag."""
    config = memory.MemoryConfig(model=("llama-2-7b", "llama-2-13b"), methods=("all",), card="rtx_4090", by="formula")
    text = memory.benchmark(config)
    assert text.startswith("bfloat16, remat=full, by the formula, for rtx_4090 (23.5 GiB)")
    cells = [line.strip("|").split("|") for line in text.splitlines()[4:]]
    assert len(cells) == 2 * (len(memory.ALL) + 2)
    fits = {(cell[0].strip(), cell[1].strip()): cell[11].strip() for cell in cells}
    assert fits["llama-2-7b", "repnoise"] == "yes" and fits["llama-2-13b", "sft"] == "no"
    assert all(int(cell[12]) > 10 for cell in cells if cell[11].strip() == "yes" and "×" in cell[2])
    assert all("--batch_size=1" in cell[13] for cell in cells if cell[11].strip() == "no" and "10 ×" in cell[2])
    with pytest.raises(FieldError, match="methods: found 'sam', expected one of sft, "):
        memory.method_of("sam")
    assert memory.method_of("t_vaccine:layers=3").layers == 3


def test_merging_and_decoding():
    """Of the tiny model: arguments are weights, adapter and cache; what is donated is not counted twice."""
    shapes = llama.tree_shapes(llama.Llama(tiny.CONFIG))["params"]
    of = memory.merge_memory(tiny.CONFIG, "float32", None)
    assert of.arguments > memory.tree_bytes(shapes)
    few, many = (memory.decode_memory(memory.Decoding(tiny.model(), rows, 32, 8), None) for rows in (8, 16))
    row = 2 * tiny.CONFIG.num_layers * 32 * tiny.CONFIG.num_kv_heads * tiny.CONFIG.head_dim * 4
    assert many.arguments - few.arguments == pytest.approx(8 * row, rel=0.1)


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
