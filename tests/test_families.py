"""Mistral, Qwen2 and Gemma2 against transformers' PyTorch models: logits, files, adapters, generation.

Training steps are compared in tests/parity/test_families.py.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxvaccine.checkpoints.hugging_face import load_classifier, load_model, save_model
from jaxvaccine.checkpoints.peft import load_adapter, read_lora_config, save_adapter
from jaxvaccine.evaluation.generate import generate
from jaxvaccine.llama import ACTIVATIONS, Llama, hidden_states, token_logits, tree_shapes
from jaxvaccine.llama_config import FAMILIES, TARGETS, LlamaConfig
from jaxvaccine.merging import merge_adapter
from tests import rounding, tiny
from tests.checkpoints.tiny import edit_json
from tests.test_llama import our_logits, padded_batch, their_logits

pytestmark = pytest.mark.usefixtures("quick_compile")
LENGTHS = (24, 13, 1)  # of right-padded rows, longer and shorter than the windows of 5


def make_theirs(config, dtype="float32", scale=0.2):
    """A random PyTorch model in which no norm's scale is neutral and no bias zero.

    Gemma2's layers outweigh its embeddings: with tied ones it would repeat the last token for ever.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config.to_hugging_face()), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            mean = 0.0
            if name.endswith("norm.weight"):
                mean = 3.0 * ("post_" in name) if config.family.offset_norms else 1.0
            parameter.copy_(scale * torch.randn_like(parameter) + mean)
    return theirs.to(getattr(torch, dtype)).eval()


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory):
    """(transformers' model, its directory, ours, our weights) of one family."""
    directory = tmp_path_factory.mktemp(request.param)
    theirs = make_theirs(tiny.FAMILIES[request.param])
    theirs.save_pretrained(directory)
    return theirs, directory, *load_model(directory)


def test_logits_equal_transformers(family):
    theirs, _, model, frozen = family
    ids, mask = padded_batch(97, LENGTHS, max(LENGTHS))
    expected, found = their_logits(theirs, ids, mask), our_logits(model, frozen, ids, mask)
    assert np.abs(expected).max() > 1  # logits that are all near zero would agree with anything
    assert np.abs(found - expected)[mask == 1].max() <= rounding.forward(model.config, expected[mask == 1])


@functools.cache
def logits_with(name, **changes):
    model = tiny.model(config=tiny.FAMILIES[name])
    _, frozen = tiny.trees(model)
    ids, mask = padded_batch(97, LENGTHS, max(LENGTHS))
    wrong = dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
    return our_logits(wrong, frozen, ids, mask)[mask == 1]


@pytest.mark.parametrize(("name", "change"), [
    ("mistral", {"sliding_window": 6}), ("gemma2", {"sliding_layers": (False, True, False, True)}),
    ("gemma2", {"query_pre_attn_scalar": None}), ("gemma2", {"attn_logit_softcapping": None}),
])
def test_logits_notice_a_wrong_field(name, change):
    """The tolerance above can tell."""
    assert np.abs(logits_with(name, **change) - logits_with(name)).max() > 1e-3


@pytest.mark.parametrize(("name", "dtype"), [("qwen2", "bfloat16"), ("gemma2", "bfloat16"), ("gemma2", "float16")])
def test_half_precision_is_as_near_as_transformers(tmp_path, name, dtype):
    """Both differ from float32 by their rounding; ours must not be further away than theirs by more than a tenth."""
    theirs = make_theirs(tiny.FAMILIES[name], dtype)
    theirs.save_pretrained(tmp_path)
    ids, mask = padded_batch(97, LENGTHS, max(LENGTHS))
    exact = our_logits(*load_model(tmp_path, dtype=jnp.float32), ids, mask)

    def error(logits):
        return np.sqrt(np.mean((logits - exact)[mask == 1] ** 2))

    ours = error(our_logits(*load_model(tmp_path, dtype=dtype), ids, mask))
    assert 0 < ours < 1.1 * error(their_logits(theirs, ids, mask))


def test_gelu_of_large_float16():
    """Of 60, x³ is infinite in float16, and would make the derivative NaN."""
    torch = pytest.importorskip("torch")
    x = np.array([-60, -3, 0.5, 60], np.float16)
    theirs = torch.tensor(x, requires_grad=True)
    out = torch.nn.functional.gelu(theirs, approximate="tanh")
    out.sum().backward()
    found, pull = jax.vjp(ACTIVATIONS["gelu_pytorch_tanh"], jnp.asarray(x))
    np.testing.assert_allclose(found, out.detach().numpy(), rtol=1e-3)
    np.testing.assert_allclose(pull(jnp.ones_like(found))[0], theirs.grad.numpy(), rtol=1e-3, atol=1e-6)


def test_round_trip_through_files(family, tmp_path):
    theirs, directory, model, frozen = family
    assert model.config in tiny.FAMILIES.values()
    save_model(model, frozen, tmp_path / "ours")
    expected, found = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "ours"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    assert load_model(tmp_path / "ours")[0] == model
    import transformers

    ours = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(ours) is type(theirs.config)
    for field in ("sliding_window", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping",
                  "final_logit_softcapping", "head_dim", "rope_parameters", "tie_word_embeddings"):
        assert getattr(ours, field, None) == getattr(theirs.config, field, None), field


def test_adapters_to_and_from_peft(family, tmp_path):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    _, directory, _, _ = family

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")

    theirs = peft.get_peft_model(base(), peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(TARGETS), task_type="CAUSAL_LM")).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    model, frozen = load_model(directory, lora=read_lora_config(tmp_path / "theirs"))
    adapter = load_adapter(tmp_path / "theirs", model)
    ids, mask = padded_batch(97, LENGTHS, max(LENGTHS))
    expected = their_logits(theirs, ids, mask)[mask == 1]
    np.testing.assert_allclose(our_logits(model, frozen, ids, mask, adapter)[mask == 1], expected, rtol=0,
                               atol=rounding.forward(model.config, expected))

    save_adapter(adapter, model, tmp_path / "ours", base_model=directory)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    np.testing.assert_array_equal(their_logits(again, ids, mask)[mask == 1], expected)

    save_model(model, merge_adapter(model, adapter, frozen), tmp_path / "merged")
    merged = again.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        np.testing.assert_allclose(tensor, merged[name].numpy(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("common", [0, 18])
def test_greedy_generation_equals_transformers(family, common, monkeypatch):
    """Prompts shorter and longer than the window, and answers that leave it behind; rows decoded together.

    With a common beginning, which is read once, the window ends within it.
    """
    import torch

    theirs, _, model, frozen = family
    begin = np.random.default_rng(9).integers(0, 97, common)
    prompts = [np.append(begin, np.random.default_rng(i).integers(0, 97, length))
               for i, length in enumerate((1, 4, 9, 14))]
    expected = []
    for prompt in prompts:
        ids = torch.tensor(prompt[None])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                              eos_token_id=None, pad_token_id=0)
        expected.append(out[0, len(prompt):].tolist())
    assert len({token for answer in expected for token in answer}) > 10
    # Layers apart; and stacked, as on accelerators, where layers differ.
    for backend in ("cpu", "gpu") if model.config.model_type == "gemma2" else ("cpu",):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        answers = generate(model, None, frozen, prompts, max_new_tokens=12, eos_ids=(), batch_size=4, bucket=8)
        assert [answer.tolist() for answer in answers] == expected


def lowered(config, length):
    model = tiny.model(config=config)
    ids = jnp.zeros((2, length), jnp.int32)
    return jax.jit(functools.partial(hidden_states, model)).lower(
        *(tree_shapes(model)[name] for name in ("lora", "params")), ids, ids).as_text()


def test_a_window_that_hides_nothing_costs_nothing():
    mistral = dataclasses.replace(tiny.CONFIG, model_type="mistral", sliding_window=8)
    assert lowered(mistral, 8) == lowered(tiny.CONFIG, 8)
    assert lowered(mistral, 9) != lowered(tiny.CONFIG, 9)


MINIMAL = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 30,
           "num_attention_heads": 32}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("change", [{}, {"sliding_window": 7, "use_sliding_window": True}])
def test_fields_that_are_left_out_are_transformers_defaults(model_type, change):
    transformers = pytest.importorskip("transformers")
    fields = {**MINIMAL, "model_type": model_type, **(change if model_type != "llama" else {})}
    theirs = transformers.AutoConfig.for_model(**fields)
    config = LlamaConfig.from_hugging_face(fields)
    assert config == LlamaConfig.from_hugging_face(theirs.to_dict())
    if config.sliding_layers is not None or change:
        expected = getattr(theirs, "layer_types", None)
        assert expected is None or config.local_layers == tuple(kind == "sliding_attention" for kind in expected)


@pytest.mark.parametrize("config", tiny.FAMILIES.values(), ids=tiny.FAMILIES)
def test_config_round_trip(config):
    fields = json.loads(json.dumps(config.to_hugging_face()))
    assert LlamaConfig.from_hugging_face(fields) == config
    assert hash(LlamaConfig.from_hugging_face(fields)) == hash(config)
    if config.model_type == "qwen2":  # as transformers before 4.53 reads it
        assert LlamaConfig.from_hugging_face({**fields, "layer_types": None}) == config


TYPES = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(("model_type", "change", "message"), [
    ("mistral", {"attention_bias": True}, "'attention_bias': found True, expected False: not supported"),
    ("mistral", {"hidden_act": "gelu"}, "'hidden_act': found 'gelu', expected 'silu': not supported"),
    ("mistral", {"layer_types": TYPES}, "'layer_types': found .*, expected 'sliding_attention' for all layers: not s"),
    ("mistral", {"sliding_window": None, "layer_types": TYPES}, "'layer_types': .* expected 'full_attention' for all"),
    ("mistral", {"sliding_window": 0}, "'sliding_window': found 0, expected an integer of at least 1"),
    ("mistral", {"sliding_window": "4096"}, "'sliding_window': found '4096', expected an integer of at least 1"),
    ("mistral", {"rope_scaling": {"type": "yarn"}}, "'rope_scaling': found type 'yarn', expected 'llama3': not supp"),
    ("llama", {"layer_types": TYPES}, "'layer_types': found .*, expected 'full_attention' for all layers: not supp"),
    ("qwen2", {"hidden_act": "relu"}, "'hidden_act': found 'relu', expected 'silu': not supported"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "'max_window_layers': found None, expected an"),
    ("qwen2", {"layer_types": TYPES}, "'sliding_window': found None, expected an integer of at least 1, for the lay"),
    ("qwen2", {"layer_types": TYPES[:1]}, "'layer_types': found .*, expected .* for each of 2 layers: not supported"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "'layer_types': found .'chunked_attention', .*, expected '"),
    ("gemma2", {"sliding_window": None}, "'sliding_window': found None, expected an integer of at least 1"),
    ("gemma2", {"attention_bias": True}, "'attention_bias': found True, expected False: not supported"),
    ("gemma2", {"hidden_activation": "gelu"}, "'hidden_activation': found 'gelu', expected 'gelu_pytorch_tanh': not"),
    ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention': found True, expected False"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar': found 0, expected a number above 0"),
    ("gemma2", {"attn_logit_softcapping": "50"}, "'attn_logit_softcapping': found '50', expected a number above 0"),
    ("gemma2", {"final_logit_softcapping": -30.0}, "'final_logit_softcapping': found -30.0, expected a number above 0"),
    ("gemma2", {"quantization_config": {"bits": 4}}, "'quantization_config': found {'bits': 4}, expected None: not s"),
])
def test_config_errors_name_the_field(model_type, change, message):
    with pytest.raises(ValueError, match="here.json: field " + message):
        LlamaConfig.from_hugging_face(
            {**MINIMAL, "num_hidden_layers": 2, "model_type": model_type, **change}, "here.json")


@pytest.mark.parametrize(("name", "change", "message"), [
    ("mistral", {"model_type": "gemma"}, "model_type: found 'gemma', expected 'llama', 'mistral', 'qwen2' or 'gemma2'"),
    ("mistral", {"model_type": "llama"}, "sliding_window: found 5, expected None for model_type 'llama'"),
    ("gemma2", {"model_type": "qwen2"}, "query_pre_attn_scalar: found 20, expected None for model_type 'qwen2'"),
    ("gemma2", {"num_layers": 3}, r"sliding_layers: found \(True, .*\), expected one value for each of num_layers 3"),
    ("gemma2", {"sliding_window": None}, r"sliding_layers: found \(True, .*\), expected None without a sliding_window"),
    ("gemma2", {"sliding_window": 0}, "sliding_window: found 0, expected a number above 0"),
])
def test_config_values_that_do_not_fit_together(name, change, message):
    with pytest.raises(ValueError, match="LlamaConfig." + message):
        dataclasses.replace(tiny.FAMILIES[name], **change)


def test_missing_biases_and_norms_are_named(tmp_path):
    model = Llama(tiny.FAMILIES["qwen2"])
    _, frozen = tiny.trees(tiny.model(config=model.config))
    save_model(model, frozen, tmp_path / "model")
    edit_json(tmp_path / "model/config.json", model_type="mistral", layer_types=None)
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.self_attn.\w_proj.bias': found .*, expected no such"):
        load_model(tmp_path / "model")
    edit_json(tmp_path / "model/config.json", model_type="gemma2", sliding_window=4, layer_types=[TYPES[0]] * 4)
    with pytest.raises(ValueError, match=re.escape("pre_feedforward_layernorm.weight': missing, expected shape [32]")):
        load_model(tmp_path / "model")
    edit_json(tmp_path / "model/config.json", id2label={"0": "x"})
    with pytest.raises(ValueError, match="field 'model_type': found 'gemma2', expected 'llama', of a classifier"):
        load_classifier(tmp_path / "model")


def test_logits_are_capped():
    model = tiny.model(config=tiny.FAMILIES["gemma2"])
    _, frozen = tiny.trees(model)
    logits = token_logits(model, frozen, jnp.full((1, 32), 1e4) * jnp.sign(frozen["embed_tokens"][0]))
    assert 2.99 < np.abs(logits).max() <= 3
