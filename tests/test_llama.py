"""The model against transformers' PyTorch LLaMA, and against itself where there are two ways to the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine.cache import Stacked
from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.llama import (
    cache_type,
    extend_cache,
    hidden_states,
    init_adapter,
    init_frozen,
    token_logits,
    tree_shapes,
    unroll_layers,
    zero_perturbations,
)
from jaxvaccine.llama_config import Llama3RopeScaling, LlamaConfig, LoraConfig
from tests import rounding

TINY = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256}
# Wavelengths from 6 to 10,000 positions, limits at 8 and 32: high, medium and low frequencies all occur.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
KINDS = {
    "grouped_query": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3, "head_dim": 16},
    "other_head_dim": {"head_dim": 20},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "epsilon": {"rms_norm_eps": 1e-2},
}


def save_theirs(directory, dtype="float32", **changes):
    """A random PyTorch LLaMA, norms and scale included so that nothing is 1 by accident, saved by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
    theirs.to(getattr(torch, dtype)).save_pretrained(directory)
    return theirs


def their_logits(theirs, ids, mask):
    import torch

    with torch.no_grad():
        return theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.float().numpy()


def padded_batch(vocab_size, lengths, length, seed=0):
    """Random ids [B, T] with right padding, and the mask."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (len(lengths), length))
    mask = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int64)
    return ids * mask, mask


def our_logits(model, frozen, ids, mask, adapter=None):
    return np.asarray(token_logits(model, frozen, hidden_states(model, adapter, frozen, ids, mask)), np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(tmp_path, kind):
    theirs = save_theirs(tmp_path, **KINDS[kind])
    model, frozen = load_model(tmp_path)
    ids, mask = padded_batch(TINY["vocab_size"], [200, 131, 1], 200)
    expected, found = their_logits(theirs, ids, mask), our_logits(model, frozen, ids, mask)
    assert found.dtype == np.float32
    assert np.abs(expected).max() > 1  # logits that are all near zero would agree with anything
    assert np.abs(found - expected)[mask == 1].max() <= rounding.forward(model.config, expected[mask == 1])


@pytest.mark.parametrize("change", [{"rope_scaling": None}, {"rope_theta": 20000.0}, {"rms_norm_eps": 1e-3}])
def test_logits_notice_a_wrong_field(tmp_path, change):
    """The tolerance above can tell: each of these fields, when wrong, is seen, far above it."""
    theirs = save_theirs(tmp_path, **KINDS["llama3_rope"])
    model, frozen = load_model(tmp_path)
    wrong = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
    ids, mask = padded_batch(TINY["vocab_size"], [200, 131, 1], 200)
    assert np.abs(our_logits(wrong, frozen, ids, mask) - their_logits(theirs, ids, mask))[mask == 1].max() > 1e-2


def test_all_regions_of_llama3_rope_occur():
    config = LlamaConfig.from_hugging_face({**TINY, "model_type": "llama", **KINDS["llama3_rope"]})
    wavelengths = 2 * np.pi / 10000.0 ** (-np.arange(0, 16, 2) / 16)
    assert (wavelengths < 8).any()
    assert ((wavelengths > 8) & (wavelengths < 32)).any()
    assert (wavelengths > 32).any()
    assert config.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_as_transformers(tmp_path, dtype):
    """Both differ from float32 by their rounding; ours must not be further away than theirs by more than half."""
    save_theirs(tmp_path / "half", dtype)
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    model, frozen = load_model(tmp_path / "half", dtype=dtype)
    exact_model, exact_frozen = load_model(tmp_path / "half", dtype=jnp.float32)
    assert model.dtype == jnp.dtype(dtype)
    ids, mask = padded_batch(TINY["vocab_size"], [40, 17], 40)
    exact = our_logits(exact_model, exact_frozen, ids, mask)

    def error(logits):
        return np.sqrt(np.mean((logits - exact)[mask == 1] ** 2))

    ours, theirs_error = error(our_logits(model, frozen, ids, mask)), error(their_logits(theirs, ids, mask))
    assert 0 < ours < 1.5 * theirs_error
    assert ours < 0.05 * np.abs(exact).max()


@functools.cache
def tiny_model(lora=None, **changes):
    model, _ = _tiny_architecture(lora, **changes)
    frozen = init_frozen(model, jax.random.key(0))
    return model, jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 2 else leaf, frozen)


def _tiny_architecture(lora, **changes):
    from jaxvaccine.llama import Llama

    config = LlamaConfig.from_hugging_face({**TINY, "model_type": "llama"})
    return Llama(dataclasses.replace(config, **changes), lora), config


def test_padding_and_other_rows_do_not_matter():
    model, frozen = tiny_model()
    ids, mask = padded_batch(101, [12, 7], 12)
    full = our_logits(model, frozen, ids, mask)
    alone = our_logits(model, frozen, ids[1:, :7], mask[1:, :7])
    np.testing.assert_allclose(full[1, :7], alone[0], rtol=0, atol=rounding.forward(model.config, alone))
    # One program, in which what is masked has weight 0.
    np.testing.assert_array_equal(our_logits(model, frozen, ids + 3 * (1 - mask), mask)[mask == 1], full[mask == 1])


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("steps", [pytest.param([1] * 10, marks=pytest.mark.long), [4, 1, 1, 4],
                                   pytest.param([10], marks=pytest.mark.long)])
def test_extending_a_cache_equals_the_full_forward(steps, unroll):
    """Half of the steps go into one cache of 12 slots, the others into one of their own each."""
    lora = LoraConfig(rank=2, targets=("q_proj", "v_proj", "down_proj"))
    model, frozen = tiny_model(lora, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 32))
    config = model.config
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, init_adapter(model, jax.random.key(1)))
    ids, _ = padded_batch(config.vocab_size, [10, 10], 10)
    expected = hidden_states(model, adapter, frozen, ids, np.ones_like(ids))
    tolerance = rounding.forward(config, expected)
    if unroll:
        model, adapter, frozen = (
            model.clone(unroll=True), unroll_layers(model, adapter), unroll_layers(model, frozen))
    kind = cache_type(model)
    # Garbage in the slots that do not count yet must not show.
    cache = jax.tree.map(lambda x: jnp.full_like(x, 9), kind.empty(config, 2, 12, model.dtype))
    cache = cache._replace(lengths=jnp.zeros(2, jnp.int32))
    caches, start = [], 0
    for step in steps:
        chunk = ids[:, start:start + step]
        hidden, new = extend_cache(model, adapter, frozen, chunk, np.ones_like(chunk), (cache, *caches))
        np.testing.assert_allclose(hidden, expected[:, start:start + step], rtol=0, atol=tolerance)
        new, start = kind.of(new, jnp.full(2, step)), start + step
        if start > 5:
            caches.append(new)
        else:
            cache = cache.append(new)
    assert start == 10


def test_rows_of_a_cache_have_their_own_positions():
    model, frozen = tiny_model()
    ids, mask = padded_batch(101, [6, 3], 6)
    hidden, new = extend_cache(model, None, frozen, ids, mask)
    tolerance = rounding.forward(model.config, hidden)
    np.testing.assert_allclose(hidden, hidden_states(model, None, frozen, ids, mask), rtol=0, atol=tolerance)
    chunk = np.array([[5], [7]])
    cache = Stacked.of(new, jnp.array([6, 3]))
    found, _ = extend_cache(model, None, frozen, chunk, np.ones_like(chunk), (cache,))
    for row, length in enumerate((6, 3)):
        alone = np.append(ids[row, :length], chunk[row])[None]
        expected = hidden_states(model, None, frozen, alone, np.ones_like(alone))
        np.testing.assert_allclose(found[row, 0], expected[0, -1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.long), "dots"])
def test_remat_changes_no_number(remat):
    lora = LoraConfig(rank=2, targets=("q_proj",))
    model, frozen = tiny_model(lora)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, init_adapter(model, jax.random.key(1)))
    ids, mask = padded_batch(101, [9, 5], 9)

    def gradient(model):
        return jax.grad(lambda adapter: jnp.sum(hidden_states(model, adapter, frozen, ids, mask) ** 2))(adapter)

    # A backward pass has twice the products of a forward pass, and comes after one.
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(
        found, expected, rtol=0, atol=3 * rounding.forward(model.config, expected)),
        gradient(dataclasses.replace(model, remat=remat)), gradient(model))


def test_perturbations_are_added_to_the_attention_output():
    """At one layer, a perturbation e equals an o_proj that adds e: checked by the gradient of a linear probe."""
    model, frozen = tiny_model()
    ids, mask = padded_batch(101, [5], 5)
    zero = zero_perturbations(model, 1, 5)
    plain = hidden_states(model, None, frozen, ids, mask)
    np.testing.assert_array_equal(hidden_states(model, None, frozen, ids, mask, perturbations=zero), plain)
    assert zero["layers"]["attention"]["output"].shape == (3, 1, 5, 48)
    moved = jax.tree.map(lambda leaf: leaf.at[2, 0, 4].set(1.0), zero)
    difference = np.abs(hidden_states(model, None, frozen, ids, mask, perturbations=moved) - plain).max(axis=(0, 2))
    assert difference[4] > 1e-3
    assert difference[:4].max() < 1e-6  # the last layer's perturbation stays at its position


def test_adapter_shapes_and_dropout():
    model, frozen = tiny_model(LoraConfig(rank=2, dropout=0.5, targets=("k_proj", "gate_proj")))
    adapter = init_adapter(model, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, adapter) == {"layers": {
        "attention": {"k_proj": {"a": (3, 48, 2), "b": (3, 2, 24)}},
        "mlp": {"gate_proj": {"a": (3, 48, 2), "b": (3, 2, 80)}}}}
    bound = 1 / np.sqrt(48)  # Kaiming-uniform, a = √5
    a = adapter["layers"]["attention"]["k_proj"]["a"]
    assert 0.9 * bound < np.abs(a).max() <= bound
    ids, mask = padded_batch(101, [6], 6)
    plain = hidden_states(model, None, frozen, ids, mask)
    np.testing.assert_array_equal(hidden_states(model, adapter, frozen, ids, mask), plain)  # B is zero
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    states = [hidden_states(model, moved, frozen, ids, mask, key=key)
              for key in (None, None, *jax.random.split(jax.random.key(2)))]
    np.testing.assert_array_equal(states[0], states[1])
    assert all(np.abs(states[0] - other).max() > 1e-3 for other in states[2:])
    assert np.abs(states[2] - states[3]).max() > 1e-3


def test_an_adapter_without_sites_is_an_error():
    model, frozen = tiny_model()
    ids, mask = padded_batch(101, [3], 3)
    with pytest.raises(ValueError, match="found an adapter for a model without LoRA sites"):
        hidden_states(model, {"layers": {}}, frozen, ids, mask)
    with pytest.raises(ValueError, match="the model has no LoRA sites"):
        init_adapter(model, jax.random.key(0))
    assert list(tree_shapes(model)) == ["params"]


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "phi3"}, "field 'model_type': found 'phi3', expected 'llama', .* or 'gemma2': not supported"),
    ({"model_type": None}, "field 'model_type' is missing"),
    ({"sliding_window": 4096}, "field 'sliding_window': found 4096, expected None: not supported"),
    ({"attention_bias": True}, "field 'attention_bias': found True, expected False: not supported"),
    ({"mlp_bias": True}, "field 'mlp_bias': found True, expected False: not supported"),
    ({"hidden_act": "gelu"}, "field 'hidden_act': found 'gelu', expected 'silu': not supported"),
    ({"quantization_config": {"bits": 4}}, "field 'quantization_config': found"),
    ({"partial_rotary_factor": 0.5}, "field 'partial_rotary_factor': found 0.5, expected 1.0: not supported"),
    ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "field 'partial_rotary_factor': found 0.5"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "field 'rope_scaling': found type 'linear', expected"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "field 'rope_scaling': found type 'yarn'"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "field 'rope_scaling': found type 'dyn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "field 'rope_scaling': low_freq_factor, .* missing"),
    ({"hidden_size": None}, "field 'hidden_size' is missing"),
    ({"vocab_size": "101"}, "field 'vocab_size': found '101', expected an integer of at least 1"),
    ({"num_hidden_layers": 0}, "field 'num_hidden_layers': found 0, expected an integer of at least 1"),
    ({"head_dim": 12.5}, "field 'head_dim': found 12.5, expected an integer of at least 1"),
])
def test_config_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match="here.json: " + message):
        LlamaConfig.from_hugging_face({**TINY, "model_type": "llama", **change}, "here.json")


def test_config_values_that_do_not_fit_together():
    fields = {**TINY, "model_type": "llama"}
    with pytest.raises(ValueError, match=r"num_kv_heads: found 3, expected a divisor of num_heads 4"):
        LlamaConfig.from_hugging_face({**fields, "num_key_value_heads": 3})
    with pytest.raises(ValueError, match=r"head_dim: found 5, expected an even number"):
        LlamaConfig.from_hugging_face({**fields, "head_dim": 5})


@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip_through_transformers(tmp_path, kind):
    import json

    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(**{**TINY, **KINDS[kind]}).save_pretrained(tmp_path / "theirs")
    ours = LlamaConfig.from_hugging_face(json.loads((tmp_path / "theirs/config.json").read_text()))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text(json.dumps(ours.to_hugging_face()))
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "again")
    assert LlamaConfig.from_hugging_face(json.loads((tmp_path / "again/config.json").read_text())) == ours
    assert LlamaConfig.from_hugging_face(ours.to_hugging_face()) == ours


def test_config_of_transformers_4():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
               "rope_type": "llama3"}
    config = LlamaConfig.from_hugging_face({**TINY, "model_type": "llama", "rope_theta": 500000.0,
                                            "rope_scaling": scaling})
    assert (config.rope_theta, config.rope_scaling) == (5e5, Llama3RopeScaling(8.0, 1.0, 4.0, 8192))
    assert LlamaConfig.from_hugging_face({**TINY, "model_type": "llama"}).rope_theta == 10000.0
