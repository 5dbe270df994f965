import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.checkpoints.hugging_face import load_model, resolve_model, save_model
from jaxvaccine.llama import Llama, init_adapter
from jaxvaccine.llama_config import LoraConfig
from tests.checkpoints.tiny import CONFIG, assert_trees_equal, edit_json, edit_tensors, random_model, saved_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_saved_model_loads_bit_for_bit(tmp_path, dtype, tied, max_shard_bytes):
    model, frozen = random_model(dtype=dtype, tie_word_embeddings=tied)
    save_model(model, frozen, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    loaded, weights = load_model(tmp_path / "model", dtype=np.float16 if dtype == jnp.float16 else None)
    assert loaded == model
    assert hash(loaded) == hash(model)  # or else everything would be compiled twice
    assert_trees_equal(weights, frozen)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3 or max_shard_bytes > 20_000


def test_each_tensor_lands_in_its_place(tmp_path):
    """Against the names and the orientation that Hugging Face documents, without our own writer."""
    _, frozen = random_model()
    layers = frozen["layers"]
    tensors = {"model.embed_tokens.weight": frozen["embed_tokens"], "lm_head.weight": frozen["lm_head"].T,
               "model.norm.weight": frozen["norm"]["scale"]}
    for i in range(CONFIG.num_layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        tensors[f"{prefix}.post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = layers["attention"][name]["kernel"][i].T
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{prefix}.mlp.{name}.weight"] = layers["mlp"][name]["kernel"][i].T
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hugging_face()))
    assert_trees_equal(load_model(tmp_path)[1], frozen)


@pytest.mark.parametrize("block_bytes", [1, 1000, 10**9])
def test_block_size_does_not_matter(tmp_path, monkeypatch, block_bytes):
    _, frozen = saved_model(tmp_path / "model")
    monkeypatch.setattr(hugging_face, "BLOCK_BYTES", block_bytes)
    assert_trees_equal(load_model(tmp_path / "model")[1], frozen)


@pytest.mark.parametrize("stored", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_cast_on_loading(tmp_path, stored, wanted):
    saved_model(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    edit_tensors(path, lambda tensors: {name: value.astype(stored) for name, value in tensors.items()})
    model, frozen = load_model(tmp_path / "model", dtype=wanted)
    assert model.dtype == wanted
    expected = load_file(path)[Q_PROJ].T.astype(wanted)
    np.testing.assert_array_equal(np.asarray(frozen["layers"]["attention"]["q_proj"]["kernel"][1]), expected)


def test_dtype_of_a_mixed_checkpoint_holds_all_tensors(tmp_path):
    saved_model(tmp_path / "model", dtype=jnp.bfloat16)
    edit_tensors(tmp_path / "model/model.safetensors",
                 lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"].astype(np.float32)})
    assert load_model(tmp_path / "model")[0].dtype == jnp.float32


def test_float64_needs_x64(tmp_path):
    saved_model(tmp_path / "model")
    edit_tensors(tmp_path / "model/model.safetensors",
                 lambda tensors: {name: value.astype(np.float64) + 1e-12 for name, value in tensors.items()})
    for dtype in (None, np.float64):
        with pytest.raises(ValueError, match=r"dtype: found float64, expected one of float32, .*jax_enable_x64"):
            load_model(tmp_path / "model", dtype=dtype)
    with jax.enable_x64(True):
        model, frozen = load_model(tmp_path / "model")
        assert model.dtype == np.float64
        expected = load_file(tmp_path / "model/model.safetensors")["model.norm.weight"]
        np.testing.assert_array_equal(np.asarray(frozen["norm"]["scale"]), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, bool])
def test_dtype_asked_for_must_be_a_float(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"dtype: found (int8|int32|bool), expected one of float32"):
        load_model(tmp_path, dtype=dtype)


def test_lora_and_remat_are_the_models(tmp_path):
    saved_model(tmp_path / "model")
    lora = LoraConfig(rank=2, targets=("v_proj",))
    model, _ = load_model(tmp_path / "model", lora=lora, remat="dots")
    assert (model.lora, model.remat) == (lora, "dots")
    assert list(init_adapter(model, jax.random.key(0))["layers"]["attention"]) == ["v_proj"]


def test_tensors_that_may_be_ignored(tmp_path):
    _, frozen = saved_model(tmp_path / "model", tie_word_embeddings=True)
    edit_tensors(tmp_path / "model/model.safetensors", lambda tensors: {
        **tensors, "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)})
    assert_trees_equal(load_model(tmp_path / "model")[1], frozen)


def remove(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(("edit", "message"), [
    (remove(Q_PROJ), rf"model.safetensors: tensor '{Q_PROJ}': missing, expected shape \[40, 48\]$"),
    (remove("lm_head.weight"), r"tensor 'lm_head.weight': missing, expected shape \[97, 48\]$"),
    (lambda t: {**t, Q_PROJ: np.ascontiguousarray(t[Q_PROJ].T)},
     rf"model.safetensors: tensor '{Q_PROJ}': found shape \[48, 40\], expected \[40, 48\]$"),
    (lambda t: {**t, Q_PROJ: t[Q_PROJ].astype(np.int8)},
     rf"model.safetensors: tensor '{Q_PROJ}': found dtype I8, expected one of F64, F32"),
    (lambda t: {**t, Q_PROJ: t[Q_PROJ].astype(ml_dtypes.float8_e4m3fn)}, "found dtype F8_E4M3, expected"),
    (lambda t: {**t, "model.layers.1.self_attn.q_proj.bias": t["model.norm.weight"]},
     "model.safetensors: tensor 'model.layers.1.self_attn.q_proj.bias': found shape .48., expected no such tensor"),
    (lambda t: {**t, "model.layers.3.input_layernorm.weight": t["model.norm.weight"]}, "expected no such tensor"),
    (lambda t: {key.removeprefix("model."): value for key, value in t.items()}, "and 57 more such errors"),
])
def test_wrong_tensors(tmp_path, monkeypatch, edit, message):
    saved_model(tmp_path / "model")
    edit_tensors(tmp_path / "model/model.safetensors", edit)
    monkeypatch.setattr(hugging_face, "_load_leaf", lambda *_: pytest.fail("weights were read before the check"))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("size", [0, 7, 100, 5_000, -1])
def test_truncated_file(tmp_path, size):
    saved_model(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"model.safetensors: found {path.stat().st_size} bytes.*expected a safeten"):
        load_model(tmp_path / "model")
    if size < 0:
        with pytest.raises(ValueError, match=r"truncated: tensor 'model.norm.weight' \(of 1\) is not whole"):
            load_model(tmp_path / "model")


@pytest.mark.parametrize("content", [b"\x80\x04pickle", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_not_a_safetensors_file(tmp_path, content):
    saved_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors: found .* expected a safetensors file"):
        load_model(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    model, frozen = random_model()
    return save_model(model, frozen, tmp_path / "model", max_shard_bytes=100_000)


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002-of-00003.safetensors: missing shard, expected by .* hold"):
        load_model(sharded)


def test_truncated_shard(sharded):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"00002-of-00003.safetensors: found .* truncated: tensor"):
        load_model(sharded)


def test_index_that_names_another_shard(sharded):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {
        "model.embed_tokens.weight": "model-00003-of-00003.safetensors"})
    with pytest.raises(ValueError, match=r"index.json: tensor 'model.embed_tokens.weight': found in model-00001.* "
                                         r"expected in model-00003"):
        load_model(sharded)


def test_tensor_in_two_shards(sharded):
    edit_tensors(sharded / "model-00003-of-00003.safetensors",
                 lambda tensors: {**tensors, "model.embed_tokens.weight": np.zeros((97, 48), np.float32)})
    with pytest.raises(ValueError, match=r"tensor 'model.embed_tokens.weight': found also in model-00001"):
        load_model(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"lm_head.weight": "../away.safetensors"}, {"lm_head.weight": 3}])
def test_malformed_index(sharded, weight_map):
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match=r"index.json: field 'weight_map': expected"):
        load_model(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", None])
def test_no_safetensors(tmp_path, name):
    saved_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    if name:
        (tmp_path / "model" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"found {name or 'no weights'}, expected model.safetensors .*pickles"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(("content", "message"), [
    (b'{\n "model_type": "llama",\n "hidden_size" 3\n}', r"config.json, line 3: found malformed JSON \(.* column 16 "),
    (b"", r"config.json, line 1: found malformed JSON"),
    (b"[]", "config.json: found a JSON list, expected an object"),
    (b'{"model_type": "\xff"}', "config.json, line 1: found byte 0xff at offset 16, expected UTF-8"),
    (b'{"model_type": "llama"}', "config.json: field '[a-z_]*' is missing"),
])
def test_bad_config(tmp_path, content, message):
    saved_model(tmp_path / "model")
    (tmp_path / "model/config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


def test_config_with_bom_and_crlf(tmp_path):
    _, frozen = saved_model(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert_trees_equal(load_model(tmp_path / "model")[1], frozen)


def test_what_looks_like_a_path_never_asks_the_hub(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in (tmp_path / "absent", str(tmp_path / "absent"), "./absent", "../absent", "~/absent-of-jaxvaccine",
                 "a/b/c", "absent.gguf", "runs/absent", "owner/absent.safetensors", "", "with space"):
        if name == "":  # Path("") is the current directory, which holds no model
            with pytest.raises(ValueError, match=r"found no config.json"):
                resolve_model(name)
            continue
        with pytest.raises(FileNotFoundError, match="found no such file or directory, expected a model directory"):
            resolve_model(name)


def test_hub_ids(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/Name-1.0") == tmp_path
    assert asked[0][0] == "owner/Name-1.0" and asked[0][2] is None
    resolve_model("owner/Name-1.0", "v2")
    assert asked[1][2] == "v2"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="found revision 'v2', expected none: it is no model of the hub"):
        resolve_model(tmp_path, "v2")
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[0][1])

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"owner/name: found neither a local directory nor .*OSError: no network"):
        resolve_model("owner/name")


def test_directories_and_files_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"found no config.json, expected a Hugging Face model directory"):
        resolve_model(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.pt: found a file, expected a model directory, a .gguf file"):
        resolve_model(tmp_path / "weights.pt")


def test_nothing_is_overwritten(tmp_path):
    model, frozen = saved_model(tmp_path / "model")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    other, weights = random_model(seed=7)
    with pytest.raises(FileExistsError, match=r"found a model \(config.json\), expected a directory without one"):
        save_model(other, weights, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="found a file, expected a directory"):
        save_model(model, frozen, tmp_path / "file")


def test_other_files_of_the_directory_stay(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/report.md").write_text("mine")
    _, frozen = saved_model(tmp_path / "model")
    assert (tmp_path / "model/report.md").read_text() == "mine"
    assert_trees_equal(load_model(tmp_path / "model")[1], frozen)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model, frozen = random_model()
    monkeypatch.setattr(hugging_face, "_take_layer", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        save_model(model, frozen, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_not_saved(tmp_path):
    model, frozen = random_model()
    with pytest.raises(ValueError, match=r"save_model: weight \['embed_tokens'\]: found float32\[97, 48\], "
                                         r"expected bfloat16\[97, 48\]"):
        save_model(Llama(CONFIG, dtype=jnp.bfloat16), frozen, tmp_path / "model")
    with pytest.raises(ValueError, match=r"save_model: weight \['lm_head'\]: missing"):
        save_model(model, {name: leaf for name, leaf in frozen.items() if name != "lm_head"}, tmp_path / "model")
    with pytest.raises(ValueError, match=r"save_model: weight \['bias'\]: found, expected no such weight"):
        save_model(model, {**frozen, "bias": frozen["embed_tokens"]}, tmp_path / "model")


def test_tokenizer_files_and_ids_are_copied(tmp_path):
    model, frozen = saved_model(tmp_path / "source")
    edit_json(tmp_path / "source/config.json", eos_token_id=[2, 5], bos_token_id=1)
    with pytest.raises(ValueError, match=r"source: found no tokenizer.json, expected the tokenizer"):
        save_model(model, frozen, tmp_path / "merged", tokenizer_from=tmp_path / "source")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / "source" / name).write_text(json.dumps(name))
    save_model(model, frozen, tmp_path / "merged", tokenizer_from=tmp_path / "source")
    assert json.loads((tmp_path / "merged/tokenizer.json").read_text()) == "tokenizer.json"
    fields = json.loads((tmp_path / "merged/config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, [2, 5], None)


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False), ("float16", False)])
def test_transformers_reads_what_we_write(tmp_path, dtype, tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, frozen = random_model(dtype=jnp.dtype(dtype), tie_word_embeddings=tied)
    save_model(model, frozen, tmp_path / "model", max_shard_bytes=100_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == getattr(torch, dtype)
    assert theirs.config.eos_token_id is None
    weights = theirs.state_dict()
    assert torch.equal(weights["model.layers.2.mlp.down_proj.weight"].float(), torch.from_numpy(
        np.array(frozen["layers"]["mlp"]["down_proj"]["kernel"][2].T, np.float32)))
    assert torch.equal(weights["lm_head.weight"].float(), torch.from_numpy(
        np.array(frozen["embed_tokens"] if tied else frozen["lm_head"].T, np.float32)))


MEASURE = """
import resource, sys, jax
from jaxvaccine.checkpoints.hugging_face import load_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_model(sys.argv[1], dtype=sys.argv[3])
before = peak()
_, frozen = load_model(sys.argv[2], dtype=sys.argv[3])
size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
print(peak() - before, size(frozen), size(frozen["layers"]) // 12)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_host_memory(tmp_path, dtype):
    """On CPU the device's memory counts too, hence: the model, one layer, and what compiling the copies takes."""
    saved_model(tmp_path / "small")
    saved_model(tmp_path / "large", hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12,
                num_kv_heads=12, head_dim=64, vocab_size=8000)
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large", dtype],
                          capture_output=True, text=True, check=True)
    grown, model, layer = map(int, done.stdout.split())
    assert model > 150e6
    assert grown < model + layer + 48e6, (grown, model, layer)
    shutil.rmtree(tmp_path / "large")
