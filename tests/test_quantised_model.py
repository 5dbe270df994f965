"""A quantised backbone computes what the dequantised one does: losses, every defense's gradient, answers; and no more
than a kernel of it is ever in floats."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine import llama, memory, save_model
from jaxvaccine.evaluation.generate import generate
from jaxvaccine.experiment.methods import ALIGNMENT, Booster, Kl, Lisa, Undefended
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.merging import Update, freeze_adapter, merge_adapter
from jaxvaccine.quantisation import KINDS, dequantise_kernels, quantise_kernels
from tests import tiny

pytestmark = pytest.mark.usefixtures("float64", "quick_compile")

# Two blocks in a column, the second not whole.
CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=2, intermediate_size=80)
BATCHES = {"alignment": tiny.batch(0), "harmful": tiny.batch(1), "harmless": tiny.batch(2), "user": tiny.batch(3),
           "adversary": tiny.batch(4, rows=12)}
# Second derivatives, and the simulated attack's steps, take long to compile.
LONG = {name: pytest.mark.long for name in (
    "sft", "vaccine", "booster", "booster_exact", "repnoise", "tar", "none", "lisa", "kl")}
METHODS = {**{name: method() for name, method in ALIGNMENT.items()}, "booster_exact": Booster(exact=True),
           "none": Undefended(), "lisa": Lisa(), "kl": Kl()} | {"t_vaccine": ALIGNMENT["t_vaccine"](layers=1)}


def problem(kind, dtype=jnp.float64, config=CONFIG, remat="none", **more):
    """(model, adapter, the quantised base, what it stands for)."""
    model = tiny.model(config=config, dtype=dtype, remat=remat, **more)
    adapter, frozen = tiny.trees(model)
    quantised = quantise_kernels(frozen, kind)
    return model, adapter, quantised, dequantise_kernels(quantised, dtype)


def gradient(method, model, adapter, frozen):
    defense = method.make(model) if not isinstance(method, Undefended | Lisa | Kl) else method.make(model, 10, None)
    grads, _, metrics = jax.jit(defense.gradient)(adapter, frozen, defense.init(adapter), BATCHES, jax.random.key(0))
    return grads, metrics


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG.get(name, ())) for name in METHODS])
def test_gradients_are_those_on_the_dequantised_base(name):
    # An adapter on fewer projections compiles sooner.
    model, adapter, quantised, expected = problem(
        "nf4", remat="full" if name == "sft" else "none", targets=("v_proj", "down_proj"))
    found = gradient(METHODS[name], model, adapter, quantised)
    wanted = gradient(METHODS[name], model, adapter, expected)
    assert tiny.relative_difference(found[0], wanted[0]) < 1e-12
    np.testing.assert_allclose(found[1]["loss"], wanted[1]["loss"], rtol=1e-12)


@pytest.mark.parametrize("kind, dtype", [
    pytest.param("int8", jnp.float32, marks=pytest.mark.long), ("nf4", jnp.bfloat16)])
def test_loss_in_the_types_of_training(kind, dtype):
    """bfloat16 rounds the same weights: what differs is where sums are rounded."""
    model, adapter, quantised, expected = problem(kind, dtype)
    loss = jax.jit(jax.value_and_grad(lambda adapter, frozen: causal_lm_loss(model)(
        adapter, frozen, BATCHES["alignment"])[0]))
    (found, grads), (wanted, wanted_grads) = loss(adapter, quantised), loss(adapter, expected)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(found, wanted, rtol=tolerance)
    assert tiny.relative_difference(grads, wanted_grads) < tolerance
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def states(model, adapter, frozen):
    return jax.jit(functools.partial(llama.hidden_states, model))(
        adapter, frozen, BATCHES["alignment"]["input_ids"], BATCHES["alignment"]["attention_mask"])


@pytest.mark.long
def test_biases_and_layers_apart():
    """Biases go where they went; and layers apart, as generation on a CPU has them, compute what stacked ones do."""
    model, adapter, quantised, expected = problem("nf4", config=tiny.FAMILIES["qwen2"])
    found = states(model, adapter, quantised)
    np.testing.assert_allclose(found, states(model, adapter, expected), rtol=1e-12, atol=1e-12)
    apart, _ = jax.jit(functools.partial(llama.extend_cache, model.clone(unroll=True)))(
        llama.unroll_layers(model, adapter), llama.unroll_layers(model, quantised),
        BATCHES["alignment"]["input_ids"], BATCHES["alignment"]["attention_mask"])
    np.testing.assert_allclose(apart, found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.long), "nf4"])
def test_the_same_answers(kind):
    model, adapter, quantised, expected = problem(kind)
    prompts = [np.arange(5) + i for i in range(4)]
    found, wanted = (generate(model, adapter, frozen, prompts, max_new_tokens=6, eos_ids=())
                     for frozen in (quantised, expected))
    np.testing.assert_array_equal(found, wanted)
    assert len({tuple(answer) for answer in found}) > 1


@pytest.mark.long
def test_a_frozen_adapter_is_a_merged_one():
    """Both of two, the second on fewer projections."""
    model, first, _, frozen = problem("nf4")
    second = tiny.model(rank=2, alpha=3.0, targets=("q_proj", "down_proj"), config=CONFIG, dtype=jnp.float64)
    other, new = tiny.trees(second, 1)[0], tiny.trees(model, 2)[0]
    beside = freeze_adapter(second, other, freeze_adapter(model, first, frozen))
    assert beside["layers"]["mlp"]["down_proj"]["update"].a.shape == (2, 80, 6)
    merged = merge_adapter(second, other, merge_adapter(model, first, frozen))
    found, expected = (states(model, new, base) for base in (beside, merged))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    grads = [gradient(METHODS["none"], model, new, base)[0] for base in (beside, merged)]
    assert tiny.relative_difference(*grads) < 1e-10
    assert tiny.relative_difference(found, states(model, new, frozen)) > 0.01
    # Without a new adapter too: a bare base, as it is evaluated.
    bare = [states(model, None, base) for base in (beside, merged)]
    np.testing.assert_allclose(*bare, rtol=1e-10, atol=1e-10)


def test_updates_are_in_the_type_of_the_computation():
    model, adapter, quantised, _ = problem("nf4", jnp.bfloat16)
    update = freeze_adapter(model, adapter, quantised)["layers"]["attention"]["q_proj"]["update"]
    assert isinstance(update, Update) and update.a.dtype == update.b.dtype == jnp.bfloat16


def test_nothing_is_merged_into_quantised_weights(tmp_path):
    model, adapter, quantised, _ = problem("int8")
    with pytest.raises(ValueError, match="merge_adapter: found a quantised base, expected float weights"):
        merge_adapter(model, adapter, quantised)
    with pytest.raises(ValueError, match=r"save_model: weight .*kernel.*: missing"):
        save_model(model, quantised, tmp_path / "model")


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_second_copy_of_the_weights(kind, remat):
    """Of the whole step's temporary memory, activations and all: less than half of the kernels in floats, whether or
    not layers are rematerialised; the dequantised weights of all layers would be those."""
    config = dataclasses.replace(CONFIG, num_layers=24, hidden_size=64, intermediate_size=256)
    model = tiny.model(config=config, remat=remat)
    shapes = llama.tree_shapes(model)
    quantised = jax.eval_shape(functools.partial(quantise_kernels, kind=kind), shapes["params"])
    batch = tiny.batch(rows=1, length=4)
    loss = jax.jit(jax.grad(lambda adapter, frozen, batch: causal_lm_loss(model)(adapter, frozen, batch)[0]))
    of = memory.program_memory(loss, shapes["lora"], quantised, batch)
    kernels = memory.tree_bytes([leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"])
                                 if path[-1].key == "kernel"])
    gradients = memory.tree_bytes(shapes["lora"])
    assert of.temporary - gradients < kernels / 2, (of.temporary / kernels, gradients / kernels)
