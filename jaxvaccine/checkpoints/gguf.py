"""GGUF files of LLaMA models, converted once into Hugging Face directories, so that the rest knows one format.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's rotary embedding rotates neighbouring
features, Hugging Face's rotates halves: Q and K are stored permuted, and the permutation is undone here.
"""

import contextlib
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxvaccine.attention import rope_frequencies
from jaxvaccine.checkpoints import files, gguf_tokenizer
from jaxvaccine.checkpoints.content_hash import content_hash
from jaxvaccine.checkpoints.tensor_names import tensor_sites
from jaxvaccine.json_files import write_json
from jaxvaccine.llama_config import Llama3RopeScaling, LlamaConfig

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# Part of the cache's key: raise it when the conversion's result changes.
CONVERSION = 2
DTYPES = ("float32", "bfloat16", "float16")
LAYER_TENSORS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What is read of the model's own metadata, or says nothing about the computation. Anything else must be off.
KNOWN_KEYS = frozenset((
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.causal", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scale_linear",
    "tensor_data_layout",
))


def convert_cached(path: Path) -> Path:
    """The Hugging Face directory of a GGUF file, converted on first use; the cache is keyed by the file's content."""
    digest = content_hash(path)[:16]
    directory = files.cache_directory() / "gguf" / f"{path.stem}-{digest}-{CONVERSION}"
    if (directory / "config.json").is_file():
        return directory
    with files.staging(directory) as temporary:
        _convert(path, temporary, "float32")
        # Another process may have converted the same file meanwhile, with the same result.
        with contextlib.suppress(OSError):
            os.rename(temporary, directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: found something else in the conversion's place, expected to write {path.name} "
                         "there: remove it")
    return directory


def convert_gguf(gguf_path: str | os.PathLike, directory: str | os.PathLike, dtype: Any = "float32") -> Path:
    """Writes a GGUF model (architecture llama, any quantisation that gguf dequantises) as a Hugging Face directory.

    Args:
      gguf_path: the file.
      directory: created if needed; must not hold a model.
      dtype: of the weights written: float32, bfloat16 or float16.

    Returns:
      The directory: config.json, generation_config.json, safetensors, and the tokenizer's files.

    Raises:
      FileNotFoundError: there is no such file.
      FileExistsError: there is a model in that directory.
      ValueError: the file is damaged, or its architecture, rotary scaling or tokenizer is not supported; names file,
        key or tensor, found and expected.
    """
    path, directory = Path(gguf_path).expanduser(), Path(directory).expanduser()
    files.refuse_existing_model(directory)
    with files.staging(directory) as temporary:
        _convert(path, temporary, dtype)
        files.publish(temporary, directory, "config.json")
    return directory


def _convert(path: Path, directory: Path, dtype: Any) -> None:
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype: found {dtype.name}, expected one of {', '.join(DTYPES)}")
    reader = _open(path)
    metadata = _metadata(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _read_config(metadata, tensors, path)
    sources = _tensor_sources(config)
    _check_tensors(tensors, sources, path)
    special_ids = gguf_tokenizer.special_token_ids(metadata, path)
    gguf_tokenizer.write_tokenizer(metadata, directory, config.vocab_size, config.max_position_embeddings, path)

    def read(source, heads):
        return _dequantize(tensors[source], heads, path).astype(dtype)

    files.write_shards(directory, [
        files.NewTensor(name, math.prod(shape) * dtype.itemsize, functools.partial(read, source, heads))
        for name, (source, shape, heads) in sources.items()])
    ids = {f"{name}_token_id": special_ids.get(name) for name in ("bos", "eos", "pad")}
    ends = gguf_tokenizer.end_token_ids(metadata, path)
    write_json(directory / "generation_config.json", {
        **{name: value for name, value in ids.items() if value is not None},
        **({"eos_token_id": ends} if len(ends) > 1 else {})})
    write_json(directory / "config.json",
                     {**config.to_hugging_face(), **ids, "dtype": dtype.name, "torch_dtype": dtype.name})


def _open(path: Path) -> "GGUFReader":
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file")
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as e:  # the reader indexes into the file: damage shows as any of a dozen types
        raise ValueError(f"{path}: found a damaged or truncated file of {path.stat().st_size} bytes, expected GGUF "
                         f"({type(e).__name__}: {e})") from e


def _metadata(reader: "GGUFReader", path: Path) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (UnicodeDecodeError, IndexError, ValueError) as e:
        raise ValueError(f"{path}: found metadata that cannot be read, expected GGUF ({e})") from e


def _read_config(metadata: Mapping[str, Any], tensors: Mapping[str, "ReaderTensor"], path: Path) -> LlamaConfig:
    def fail(key, found, expected):
        raise ValueError(f"{path}: key {key!r}: found {found!r}, expected {expected}: not supported")

    if metadata.get("general.architecture") != "llama":
        fail("general.architecture", metadata.get("general.architecture"), "'llama'")
    if metadata.get("split.count", 1) > 1:
        fail("split.count", metadata["split.count"], "a model in one file")
    own = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    for key in sorted(own.keys() - KNOWN_KEYS):
        if own[key]:
            fail(f"llama.{key}", own[key], "it off")

    def require(key, kind=int):
        if not isinstance(own.get(key), kind):
            raise ValueError(f"{path}: key 'llama.{key}': found {own.get(key, 'nothing')!r}, expected one number")
        return own[key]

    def shortest(value):
        """Metadata is float32: 1e-5 and not 9.999999747378752e-06, as in the original config."""
        return float(str(np.float32(value)))

    num_heads, hidden_size = require("attention.head_count"), require("embedding_length")
    head_dim = own.get("attention.key_length") or hidden_size // num_heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            fail(f"llama.{key}", own[key], f"head size {head_dim}")
    if own.get("rope.scaling.type", "none") != "none":
        fail("llama.rope.scaling.type", own["rope.scaling.type"], "'none'")
    for key in ("rope.scale_linear", "rope.scaling.attn_factor"):
        if own.get(key) not in (None, 0.0, 1.0):
            fail(f"llama.{key}", own[key], "1.0")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: tensor 'token_embd.weight': missing")
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]), hidden_size=hidden_size,
        intermediate_size=require("feed_forward_length"), num_layers=require("block_count"), num_heads=num_heads,
        num_kv_heads=require("attention.head_count_kv") if "attention.head_count_kv" in own else num_heads,
        head_dim=head_dim, rms_norm_eps=shortest(require("attention.layer_norm_rms_epsilon", float)),
        rope_theta=shortest(own.get("rope.freq_base", 10000.0)), max_position_embeddings=require("context_length"),
        tie_word_embeddings="output.weight" not in tensors)
    if "rope_freqs.weight" not in tensors:
        return config
    return _with_rope_scaling(config, np.asarray(tensors["rope_freqs.weight"].data, np.float64), path)


def _with_rope_scaling(config: LlamaConfig, divisors: np.ndarray, path: Path) -> LlamaConfig:
    """The config with Llama 3's scaling, of which GGUF keeps only the result: a divisor for each frequency [H / 2]."""
    if divisors.shape == (config.head_dim // 2,):
        if (divisors == 1).all():
            return config
        # 1, 4 and 8192 are what Llama 3.1, 3.2 and 3.3 were published with; whether they fit is then checked.
        scaling = Llama3RopeScaling(float(str(np.float32(divisors.max()))), 1.0, 4.0, 8192)
        scaled = LlamaConfig(**{**vars(config), "rope_scaling": scaling})
        if np.allclose(rope_frequencies(config) / rope_frequencies(scaled), divisors, rtol=1e-5):
            return scaled
    raise ValueError(f"{path}: tensor 'rope_freqs.weight': found {divisors.shape} divisors from {divisors.min()} to "
                     f"{divisors.max()}, expected those of Llama 3.1's scaling: not supported")


def _tensor_sources(config: LlamaConfig) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """By Hugging Face name: GGUF's name, the shape, and the number of heads whose rows are permuted (0: none are)."""
    names = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    names |= {f"model.layers.{layer}.{name}": f"blk.{layer}.{source}"
              for layer in range(config.num_layers) for source, name in LAYER_TENSORS.items()}
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    sources = {}
    for name, site in tensor_sites(config).items():
        source = names[name.removesuffix(".weight")]
        sources[name] = f"{source}.weight", site.shape, heads.get(source.split(".")[-1], 0)
    return sources


def _check_tensors(tensors: Mapping[str, "ReaderTensor"], sources: Mapping[str, tuple[str, tuple, int]],
                   path: Path) -> None:
    for source, shape, _ in sources.values():
        if source not in tensors:
            raise ValueError(f"{path}: tensor {source!r}: missing, expected shape {list(shape)}")
        found = tuple(int(size) for size in reversed(tensors[source].shape))
        if found != shape:
            raise ValueError(f"{path}: tensor {source!r}: found shape {list(found)}, expected {list(shape)}")
    expected = {source for source, _, _ in sources.values()}
    for name in tensors:
        if name not in expected and name != "rope_freqs.weight" and not name.endswith(".attn_rot_embd.weight"):
            raise ValueError(f"{path}: tensor {name!r}: found, expected no such tensor: not supported")


def _dequantize(tensor: "ReaderTensor", heads: int, path: Path) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as e:
        raise ValueError(f"{path}: tensor {tensor.name!r}: found type {tensor.tensor_type.name}, expected one that "
                         "gguf dequantises: not supported") from e
    if not heads:
        return values
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
