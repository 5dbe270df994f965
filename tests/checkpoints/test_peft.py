import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.checkpoints.hugging_face import check_tree, load_model, save_model
from jaxvaccine.checkpoints.peft import load_adapter, read_lora_config, save_adapter, sum_adapters
from jaxvaccine.llama import Llama, hidden_states, token_logits, tree_shapes
from jaxvaccine.llama_config import TARGETS, LoraConfig
from jaxvaccine.merging import merge_adapter
from tests import rounding
from tests.checkpoints.tiny import CONFIG, assert_trees_equal, edit_json, edit_tensors, random_model

SUBSETS = [TARGETS, ("q_proj", "k_proj", "v_proj"), ("down_proj",), ("o_proj", "up_proj", "gate_proj")]
A_NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def random_adapter(model, seed=0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * generator.standard_normal(leaf.shape), leaf.dtype),
                        tree_shapes(model)["lora"])


@pytest.fixture
def saved(tmp_path):
    model = Llama(CONFIG, LoraConfig(rank=4, alpha=6, targets=("q_proj", "down_proj")))
    adapter = random_adapter(model)
    return model, adapter, save_adapter(adapter, model, tmp_path / "adapter")


@settings(max_examples=10)
@given(targets=st.sets(st.sampled_from(TARGETS), min_size=1), rank=st.integers(1, 5),
       alpha=st.sampled_from([0.5, 1.0, 4.0, 32.0]), dropout=st.sampled_from([0.0, 0.1]))
def test_round_trip_is_bitwise(tmp_path_factory, targets, rank, alpha, dropout):
    lora = LoraConfig(rank, alpha, dropout, tuple(targets))
    model = Llama(dataclasses.replace(CONFIG, num_layers=2), lora)
    adapter, directory = random_adapter(model), tmp_path_factory.mktemp("adapter")
    save_adapter(adapter, model, directory, base_model="owner/base")
    assert read_lora_config(directory) == lora
    assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    assert_trees_equal(load_adapter(directory, model), adapter)


@pytest.mark.parametrize("targets", SUBSETS)
def test_peft_loads_ours(tmp_path, targets):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    base, frozen = random_model()
    model = dataclasses.replace(base, lora=LoraConfig(rank=4, alpha=6, targets=targets))
    adapter = random_adapter(model)
    save_model(model, frozen, tmp_path / "base")
    save_adapter(adapter, model, tmp_path / "adapter", base_model=tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").merge_and_unload()
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    mask, merged = np.ones_like(ids), merge_adapter(model, adapter, frozen)
    unmerged = token_logits(model, frozen, hidden_states(model, adapter, frozen, ids, mask))
    tolerance = rounding.forward(CONFIG, expected)
    np.testing.assert_allclose(token_logits(model, merged, hidden_states(base, None, merged, ids, mask)), expected,
                               rtol=0, atol=tolerance)
    np.testing.assert_allclose(unmerged, expected, rtol=0, atol=tolerance)
    bare = token_logits(model, frozen, hidden_states(base, None, frozen, ids, mask))
    assert np.abs(bare - expected).max() > 1e-2  # the adapter does something


@pytest.mark.parametrize("targets", SUBSETS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_we_load_what_peft_wrote(tmp_path, targets, stored):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    model, frozen = random_model()
    save_model(model, frozen, tmp_path / "base")
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=list(targets), task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_((0.2 * torch.randn_like(parameter)).to(getattr(torch, stored)).float())
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(ids)).logits.numpy()
    theirs.to(getattr(torch, stored)).save_pretrained(tmp_path / "adapter")

    lora = read_lora_config(tmp_path / "adapter")
    assert lora == LoraConfig(rank=3, alpha=5, dropout=0.1, targets=targets)
    model, frozen = load_model(tmp_path / "base", lora=lora)
    adapter = load_adapter(tmp_path / "adapter", model)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    ours = token_logits(model, frozen, hidden_states(model, adapter, frozen, ids, np.ones_like(ids)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=rounding.forward(CONFIG, expected))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_adapters_are_upcast(saved, dtype):
    model, adapter, directory = saved
    edit_tensors(directory / "adapter_model.safetensors",
                 lambda tensors: {name: value.astype(dtype) for name, value in tensors.items()})
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), adapter)
    assert_trees_equal(load_adapter(directory, model), expected)
    # A base in half precision has its adapter in float32 all the same.
    assert_trees_equal(load_adapter(directory, dataclasses.replace(model, dtype=dtype)), expected)


@pytest.mark.parametrize(("field", "value"), [
    ("peft_type", "LOHA"), ("use_dora", True), ("use_rslora", True), ("bias", "lora_only"), ("lora_bias", True),
    ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}),
    ("layers_to_transform", [0]), ("layers_to_transform", 1), ("fan_in_fan_out", True), ("layer_replication", [[0, 2]]),
    ("exclude_modules", ["k_proj"]), ("target_parameters", ["x"]), ("trainable_token_indices", [1]),
    ("init_lora_weights", "pissa"), ("a_variant_of_tomorrow", True),
])
def test_unsupported_fields_are_named(saved, field, value):
    model, _, directory = saved
    edit_json(directory / "adapter_config.json", **{field: value})
    for read in (read_lora_config, lambda directory: load_adapter(directory, model)):
        with pytest.raises(ValueError, match=rf"adapter_config.json: field '{field}': found .*, expected .*not supp"):
            read(directory)


@pytest.mark.parametrize(("field", "value"), [
    ("r", 0), ("r", 2.5), ("r", "8"), ("r", True), ("r", None), ("lora_alpha", None), ("lora_alpha", "4"),
    ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("target_modules", []), ("target_modules", None),
    ("target_modules", ["q_proj", "lm_head"]), ("target_modules", ["c_attn"]), ("target_modules", "("),
    ("target_modules", [3]),
])
def test_invalid_fields_are_named(saved, field, value):
    _, _, directory = saved
    edit_json(directory / "adapter_config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"adapter_config.json: field '{field}': found .*, expected"):
        read_lora_config(directory)


@pytest.mark.parametrize(("modules", "targets"), [
    ("all-linear", TARGETS), (["self_attn.q_proj", "v_proj"], ("q_proj", "v_proj")),
    (r".*\.(q|v)_proj", ("q_proj", "v_proj")), (r".*self_attn\.[qkvo]_proj", ("q_proj", "k_proj", "v_proj", "o_proj")),
    (r"model\.layers\.\d+\.mlp\.\w+", ("gate_proj", "up_proj", "down_proj")),
    ([f"model.layers.{i}.mlp.up_proj" for i in range(3)], ("up_proj",)),
])
def test_target_modules_under_pefts_rules(saved, modules, targets):
    _, _, directory = saved
    edit_json(directory / "adapter_config.json", target_modules=modules)
    assert read_lora_config(directory).targets == targets


@pytest.mark.parametrize(("modules", "message"), [
    (r".*", "not model.embed_tokens"), (r".*layers\.0\..*q_proj", "q_proj in all of 3 layers or none, not in 1"),
    (["model.layers.0.self_attn.q_proj", "v_proj"], "q_proj in all of 3 layers"), (r"q_proj", "that it selects"),
    (r"lm_head", "not lm_head"), (r".*self_attn", "not model.layers.0.self_attn"),
])
def test_target_modules_that_are_no_whole_set(saved, modules, message):
    _, _, directory = saved
    edit_json(directory / "adapter_config.json", target_modules=modules)
    with pytest.raises(ValueError, match=f"adapter_config.json: field 'target_modules': found .*{message}"):
        read_lora_config(directory)


@pytest.mark.parametrize(("lora", "message"), [
    ({"rank": 8}, "field 'r': found 4, expected 8 .LoraConfig.rank of the model"),
    ({"alpha": 4}, "field 'lora_alpha': found 6.0, expected 4"),
    ({"targets": ("q_proj",)}, r"field 'target_modules': found .'q_proj', 'down_proj'., expected .'q_proj',."),
])
def test_adapter_of_another_lora_config(saved, lora, message):
    model, _, directory = saved
    with pytest.raises(ValueError, match="adapter_config.json: " + message):
        load_adapter(directory, dataclasses.replace(model, lora=dataclasses.replace(model.lora, **lora)))


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_size": 52}, rf"{A_NAME.replace('1', '0')}': found shape \[4, 48\], expected \[4, 52\]"),
    ({"head_dim": 12}, r"layers.0.self_attn.q_proj.lora_B.weight': found shape \[40, 4\], expected \[48, 4\]"),
    ({"num_layers": 4}, r"layers.3.self_attn.q_proj.lora_A.weight': missing, expected shape \[4, 48\]"),
    ({"num_layers": 2}, r"layers.2.mlp.down_proj.lora_A.weight': found shape \[4, 80\], expected no such tensor"),
])
def test_adapter_of_another_model(saved, changes, message):
    model, _, directory = saved
    with pytest.raises(ValueError, match="adapter_model.safetensors: tensor .*" + message):
        load_adapter(directory, dataclasses.replace(model, config=dataclasses.replace(CONFIG, **changes)))


@pytest.mark.parametrize(("edit", "message"), [
    (lambda t: {name: value for name, value in t.items() if name != A_NAME}, f"'{A_NAME}': missing"),
    (lambda t: {**t, A_NAME: t[A_NAME].astype(np.int8)}, f"'{A_NAME}': found dtype I8, expected one of"),
    (lambda t: {**t, "base_model.model.lm_head.weight": np.zeros((97, 48), np.float32)}, "expected no such tensor"),
])
def test_wrong_tensors(saved, edit, message):
    model, _, directory = saved
    edit_tensors(directory / "adapter_model.safetensors", edit)
    with pytest.raises(ValueError, match="adapter_model.safetensors: tensor .*" + message):
        load_adapter(directory, model)


def test_damaged_files(saved):
    model, _, directory = saved
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: found .* truncated"):
        load_adapter(directory, model)
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"safetensors: found no such file \(adapter_model.bin instead\)"):
        load_adapter(directory, model)
    config.write_text('{"r": 4,\n"lora_alpha" 3}')
    with pytest.raises(ValueError, match=r"adapter_config.json, line 2: found malformed JSON"):
        load_adapter(directory, model)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: found no such file"):
        load_adapter(directory, model)


def test_models_without_lora_sites(saved, tmp_path):
    model, adapter, directory = saved
    bare = dataclasses.replace(model, lora=None)
    with pytest.raises(ValueError, match="expected load_model"):
        load_adapter(directory, bare)
    with pytest.raises(ValueError, match="found a model without LoRA sites"):
        save_adapter(adapter, bare, tmp_path / "other")


def test_saving_replaces_an_adapter_and_keeps_other_files(saved):
    model, _, directory = saved
    (directory / "notes.md").write_text("mine")
    other = random_adapter(model, seed=1)
    save_adapter(other, model, directory)
    assert_trees_equal(load_adapter(directory, model), other)
    assert sorted(path.name for path in directory.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "notes.md"]
    assert [path.name for path in directory.parent.iterdir()] == ["adapter"]


def test_a_failed_save_leaves_the_old_adapter(saved, monkeypatch):
    model, adapter, directory = saved
    monkeypatch.setattr("jaxvaccine.checkpoints.files.write_shards", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_adapter(random_adapter(model, seed=1), model, directory)
    assert_trees_equal(load_adapter(directory, model), adapter)
    assert [path.name for path in directory.parent.iterdir()] == ["adapter"]


def test_adapter_that_is_not_the_models_is_not_saved(saved, tmp_path):
    model, adapter, _ = saved
    other = dataclasses.replace(model, lora=LoraConfig(2, targets=model.lora.targets))
    with pytest.raises(ValueError, match=r"weight .*: found float32\[3, \d+, 4\], expected float32\[3, \d+, 2\]"):
        save_adapter(adapter, other, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def update(model, adapter):
    """Σ over sites of the weights' update, each in float64: {path: [L, in, out]}."""
    def sites(tree, path=()):
        if "a" in tree:
            a, b = (np.asarray(tree[name], np.float64) for name in ("a", "b"))
            yield path, model.lora.scale * (a @ b)
        else:
            for name, child in tree.items():
                yield from sites(child, (*path, name))

    return dict(sites(adapter))


@settings(max_examples=12)
@given(ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
       alphas=st.tuples(*[st.sampled_from([0.5, 1.0, 4.0, 7.0])] * 2),
       targets=st.tuples(*[st.sets(st.sampled_from(TARGETS), min_size=1)] * 2))
def test_the_sum_of_two_adapters_is_one(ranks, alphas, targets):
    """Of rank r1 + r2, on the projections of both; PEFT's own scale, alpha / r, is what the update is multiplied by."""
    models = [Llama(CONFIG, LoraConfig(rank, alpha, 0.1, tuple(t for t in TARGETS if t in chosen)))
              for rank, alpha, chosen in zip(ranks, alphas, targets, strict=True)]
    adapters = [random_adapter(model) for model in models]
    lora, adapter = sum_adapters(models[0].lora, adapters[0], models[1].lora, adapters[1])
    assert lora.rank == sum(ranks) and set(lora.targets) == targets[0] | targets[1]
    check_tree(adapter, tree_shapes(Llama(CONFIG, lora))["lora"], "sum")
    found, one, two = (update(*each) for each in ((Llama(CONFIG, lora), adapter), *zip(models, adapters, strict=True)))
    for path, total in found.items():
        parts = [each[path] for each in (one, two) if path in each]
        # s2 / s1 · B2 is rounded once, where the scales differ; nothing else is.
        size = max(np.abs(part).max() for part in parts) * sum(ranks) + 1e-30
        np.testing.assert_allclose(total, sum(parts), rtol=0, atol=4 * np.finfo(np.float32).eps * size)
