"""The formula beside the GPU compiler's figures, which lie in memory_cases.csv: no GPU and none of its wheels."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.benchmarks import memory_cases
from experiments.benchmarks.memory import SIZES
from jaxvaccine import llama, losses, memory_model
from jaxvaccine.experiment import methods
from jaxvaccine.experiment.memory import Decoding, Step
from jaxvaccine.llama_config import LoraConfig
from jaxvaccine.memory import tree_bytes
from tests import tiny

CASES = memory_cases.read()


def test_of_every_kind_there_are_cases():
    """Every method, remat and dtype, heads that share keys and heads that don't, tied and untied embeddings."""
    steps = [case for case in CASES if case.method != memory_cases.DECODING]
    assert len(steps) >= 100 and len(CASES) - len(steps) >= 8
    assert {case.method.partition(":")[0] for case in steps} == {*methods.ALIGNMENT, *methods.FINE_TUNING}
    assert {case.remat for case in steps} == {"none", "dots", "full"}
    assert {case.dtype for case in steps} == {"bfloat16", "float32"}
    models = {memory_cases.architecture(case.model) for case in steps}
    assert {of.num_heads > of.num_kv_heads for of in models} == {True, False}
    assert {of.tie_word_embeddings for of in models} == {True, False}
    assert min(case.length for case in steps) == 64 and max(case.length for case in steps) == 2048
    assert min(case.rows for case in steps) == 1 and max(case.rows for case in steps) == 64


@pytest.mark.parametrize("model", sorted({case.model for case in CASES}))
def test_beside_the_compiler(model):
    """The peak to 5%, of temporary memory, which the weights would hide, to 15%; arguments are counted exactly."""
    for case in CASES:
        if case.model != model:
            continue
        temporary, peak = memory_cases.errors(case)
        assert abs(peak) < 0.05, (case, peak)
        if case.method == memory_cases.DECODING:
            continue
        assert abs(temporary) < 0.15, (case, temporary)
        of = case.program().estimate()
        batches = case.arguments - of.weights - of.adapter - of.optimizer
        assert 0 < batches <= 12 * case.length * (case.rows + 6 * case.harmful_rows) + 100


def estimate(rows, length, remat="full", method=None):
    model = llama.Llama(SIZES["llama-2-7b"], LoraConfig(8), jnp.bfloat16, remat=remat)
    return Step(model, method or methods.Sft(), rows, rows, length).estimate()


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["none", "dots", "full"]))
def test_more_takes_more(rows, eighths, remat):
    of = estimate(rows, 8 * eighths, remat)
    assert of.peak == sum((of.weights, of.adapter, of.optimizer, of.boundaries, of.gradients, max(of.layer, of.logits)))
    assert of.peak <= estimate(rows + 1, 8 * eighths, remat).peak
    assert of.peak <= estimate(rows, 8 * eighths + 8, remat).peak
    assert estimate(rows, 8 * eighths).boundaries == 32 * rows * 8 * eighths * 4096 * 2


def test_what_is_kept_follows_remat_and_the_method():
    full, dots, none = (estimate(10, 256, remat) for remat in ("full", "dots", "none"))
    assert full.boundaries < dots.boundaries < none.boundaries
    vaccine, some = (estimate(10, 256, method=of) for of in (methods.Vaccine(), methods.TVaccine(layers=4)))
    assert vaccine.perturbations == full.boundaries == 8 * some.perturbations and full.perturbations == 0
    booster = estimate(10, 256, method=methods.Booster())
    assert booster.gradients == 4 * booster.adapter and booster.boundaries == full.boundaries


def test_rows_at_a_time():
    """What is computed of a batch at a time is all that is kept; the sum of gradients is one tree more."""
    model = llama.Llama(SIZES["llama-2-7b"], LoraConfig(8), jnp.bfloat16)
    some, all_of_five = (Step(model.clone(microbatch_size=size), methods.Sft(), rows, rows, 256).estimate()
                         for rows, size in ((10, 5), (5, 0)))
    assert some.boundaries == all_of_five.boundaries and some.layer == all_of_five.layer
    assert some.gradients == all_of_five.gradients + some.adapter


def test_a_model_without_an_adapter_and_merging():
    base, adapter = memory_model.weights(tiny.model().clone(lora=None))
    shapes = llama.tree_shapes(tiny.model())
    assert (base, adapter) == (tree_bytes(shapes["params"]), 0)
    of = memory_model.merge(tiny.model())
    assert of.adapter == tree_bytes(shapes["lora"])
    assert of.layer == 4 * tiny.CONFIG.hidden_size * tiny.CONFIG.intermediate_size


def test_the_block_of_logits_is_the_losses():
    for loss in (losses.causal_lm_loss, losses.negative_entropy, losses.loss_and_kl):
        assert inspect.signature(loss).parameters["block"].default == memory_model.LOGITS_BLOCK


@pytest.mark.parametrize("rows", [*range(1, 40), 100, 256])
def test_rows_that_go_on(rows):
    """As `generate` chooses, of any number of rows that are at most half."""
    smallest = 8
    chosen = [min(rows, max(smallest, 1 << (active - 1).bit_length())) for active in range(1, rows // 2 + 1)]
    smaller = [size for size in chosen if size < rows]
    assert memory_model.kept_rows(rows, smallest) >= max(smaller, default=0)
    assert memory_model.kept_rows(rows, smallest) <= max(*smaller, rows // 2, 1)


def test_the_cache_of_decoding():
    """Of all rows, beside it half of them."""
    model = llama.Llama(SIZES["llama-2-7b"], None, jnp.bfloat16)
    of = Decoding(model, 32, 288, 96).estimate()
    cache = jax.eval_shape(lambda: llama.cache_type(model).empty(model.config, 32, 288, jnp.bfloat16))
    assert of.cache == tree_bytes((cache.k, cache.v)) and of.layer == of.cache // 2
