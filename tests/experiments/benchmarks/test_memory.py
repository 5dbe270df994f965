"""Sizes of a step, on a model whose parameters can be counted."""

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
    frozen, state, temporary = (memory.GIB * size for size in memory.step_memory(config, "float32", tiny.CONFIG))
    assert frozen == 4 * base and temporary > 0
    # Adapter and both moments; the counts of steps are a few bytes a layer.
    assert 0 <= state - 3 * 4 * adapter <= 1000


def test_the_table(monkeypatch):
    """A line for every recipe, as its method and batches are."""
    seen = []

    def step_memory(config, dtype):
        seen.append(config.method)
        return 12.55, 0.1, float(len(seen))

    monkeypatch.setattr(memory, "step_memory", step_memory)
    text = memory.benchmark(memory.MemoryConfig("bfloat16"))
    assert text.startswith("bfloat16, compiled for ")
    names = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[4:]]
    # What differs while fine-tuning alone is no line of its own.
    assert names == [name for name in recipes.pairs() if name not in ("booster/lisa", "booster/booster+lisa")]
    assert "| booster/sft | 10 × 256 | 12.55 | 0.10 | 1.00 |" in text and len(seen) == len(names)
    with pytest.raises(SystemExit, match="--dtype"):
        small.call(memory.VERB, "--dtype=float8")
