"""Hugging Face model directories, read into the stacked layout and written back.

Format: config.json and model.safetensors, or shards with model.safetensors.index.json. Pickles are never read.
"""

import dataclasses
import functools
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.checkpoints import files
from jaxvaccine.checkpoints.files import INDEX
from jaxvaccine.checkpoints.resolve import resolve_model
from jaxvaccine.checkpoints.tensor_names import Site, tensor_sites
from jaxvaccine.conventions import at_least_float32
from jaxvaccine.json_files import read_json_object, write_json
from jaxvaccine.llama import Llama, Remat, tree_shapes
from jaxvaccine.llama_config import LlamaConfig, LoraConfig
from jaxvaccine.quantisation import Kind, Quantised, quantise_kernels

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What is in flight from file to device at a time; a fraction of a layer of any model for which memory matters.
BLOCK_BYTES = 4 * 2**20


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, all present and holding what the index says."""
    single, index = directory / "model.safetensors", directory / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.safetensors")
                        for path in directory.glob(pattern))
        raise ValueError(f"{directory}: found {', '.join(others[:5]) or 'no weights'}, expected model.safetensors or "
                         f"{INDEX}: pickles (pytorch_model.bin) are not read")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and file == Path(file).name for file in weight_map.values()):
        raise ValueError(f"{index}: field 'weight_map': expected an object of file names by tensor name")
    shards = {file: directory / file for file in sorted(set(weight_map.values()))}
    for file, shard in shards.items():
        if not shard.is_file():
            tensor = next(name for name in weight_map if weight_map[name] == file)
            raise ValueError(f"{shard}: missing shard, expected by {index.name} to hold tensor {tensor!r}")
    found = files.read_headers(shards.values())
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            where = found[name].file.name if name in found else "no file"
            raise ValueError(f"{index}: tensor {name!r}: found in {where}, expected in {file}")
    return list(shards.values())


def _check_dtype(dtype: Any) -> Any:
    dtype = jnp.dtype(dtype)
    allowed = ["float32", "bfloat16", "float16"] + ["float64"] * bool(jax.config.jax_enable_x64)
    if dtype.name not in allowed:
        raise ValueError(f"dtype: found {dtype.name}, expected one of {', '.join(allowed)}"
                         + (" (float64 needs jax_enable_x64)" if dtype.name == "float64" else ""))
    return dtype.type  # a model of np.float32 equals one of jnp.float32; one of np.dtype would not


@functools.partial(jax.jit, donate_argnames="leaf", static_argnames="transposed")
def _write_rows(leaf, rows, layer, start, transposed):
    """Puts rows of a Hugging Face tensor, from row `start` on, in place into their leaf; quantised, into each part."""
    block, at = (rows.T, (0, start)) if transposed else (rows, (start, 0)[:rows.ndim])
    if isinstance(leaf, Quantised):
        # A row is an output, and what shares a scale lies within it.
        block = type(leaf).of(block)

    def write(leaf, block):
        if leaf.ndim > block.ndim:
            return jax.lax.dynamic_update_slice(leaf, block[None].astype(leaf.dtype), (layer, *at))
        return jax.lax.dynamic_update_slice(leaf, block.astype(leaf.dtype), at)

    return jax.tree.map(write, leaf, block)


def _load_leaf(shapes, dtype, parts: list[tuple[Site, files.StoredTensor]]):
    """A leaf of these shapes, one or a quantised kernel's, of a model of that dtype."""
    leaf = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    for site, tensor in parts:
        row_bytes = math.prod(tensor.shape[1:]) * jnp.dtype(DTYPES[tensor.dtype]).itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, tensor.shape[0], step):
            rows = files.read_rows(tensor, start, min(start + step, tensor.shape[0]))
            if tensor.dtype == "F64":
                rows = rows.astype(at_least_float32(dtype) if isinstance(leaf, Quantised) else dtype)
            leaf = _write_rows(leaf, rows, site.layer or 0, start, site.transposed)
            # Without waiting, blocks would pile up on the host ahead of the device.
            jax.block_until_ready(leaf)
    return leaf


def load_model(path_or_hub_id: str | os.PathLike, *, lora: LoraConfig | None = None, dtype: Any = None,
               remat: Remat = "full", quantisation: Kind = "none") -> tuple[Llama, dict[str, Any]]:
    """A model's architecture and its frozen weights, layers stacked [L, ...], on the default device.

    Names, shapes and dtypes of all tensors are checked before any weight is read; weights go block by block from the
    mapped file to the device, so that host memory stays below the model plus one layer; and are quantised there, so
    that of a quantised model the device never holds more than such a block in floats.

    Args:
      path_or_hub_id: Hugging Face directory, hub id or GGUF file, as of `resolve_model`.
      lora: adapter sites of the returned model; the frozen weights do not depend on it.
      dtype: float32, bfloat16, float16, or float64 under jax_enable_x64, to which weights are cast; None keeps the
        checkpoint's (the smallest that holds all of them, if its tensors differ), but reads float16 as bfloat16, with
        a warning: nothing scales a loss, and in float16 the gradient of a small one is zero.
      remat: what layers keep for the backward pass.
      quantisation: of the layers' kernels, from the file's own digits; `dtype` is that of the rest and of the
        computation.

    Raises:
      FileNotFoundError: something that looks like a path is not there.
      ValueError: a file is damaged or missing, a config field is not supported, or a tensor is missing, unexpected,
        of another shape or of a dtype that is no float; names file, tensor or field, found and expected.
    """
    config, stored, read, parts = _open_model(path_or_hub_id, dtype)
    if read != stored:
        logging.getLogger(__name__).warning(
            "%s: found float16 weights, read as bfloat16: in float16 the gradient of a small loss is zero",
            os.fspath(path_or_hub_id))
    model = Llama(config, lora, read, remat)
    shapes = jax.eval_shape(functools.partial(quantise_kernels, kind=quantisation), tree_shapes(model)["params"])
    return model, _load_tree(shapes, parts, read)


def loaded_dtype(path_or_hub_id: str | os.PathLike, dtype: Any = None) -> str:
    """The name of the type that `load_model` reads weights as, from their headers alone. Raises as `load_model`."""
    return jnp.dtype(_open_model(path_or_hub_id, dtype)[2]).name


def stored_dtype(path_or_hub_id: str | os.PathLike) -> str:
    """The name of the smallest type that holds all of a model's weights as they are stored, "float16" too. Raises as
    `load_model`."""
    return jnp.dtype(_open_model(path_or_hub_id, None)[1]).name


def _open_model(path_or_hub_id: str | os.PathLike, asked: Any):
    """(architecture, the type asked for or else stored, the type to read as, what each leaf is made of)."""
    asked = None if asked is None else _check_dtype(asked)
    directory = resolve_model(path_or_hub_id)
    config = LlamaConfig.from_hugging_face(read_json_object(directory / "config.json"), str(directory / "config.json"))
    stored, parts = _find_tensors(directory, config, tensor_sites(config), asked)
    read = _check_dtype(jnp.bfloat16) if asked is None and stored == jnp.float16 else stored
    return config, stored, read, parts


class Classifier(NamedTuple):
    """A LLaMA whose last token's hidden state is scored by a linear head instead of a vocabulary."""

    model: Llama
    frozen: Any  # layers stacked [L, ...]
    head: jax.Array  # [D, C]
    labels: tuple[str, ...]  # of the C scores
    problem_type: str | None  # config.json's: "multi_label_classification" has one sigmoid per label


def load_classifier(path_or_hub_id: str | os.PathLike, *, dtype: Any = None) -> Classifier:
    """A sequence classifier as transformers' LlamaForSequenceClassification stores it: score.weight beside model.*.

    Args:
      path_or_hub_id: Hugging Face directory or hub id, as of `resolve_model`.
      dtype: as of `load_model`, but None keeps float16: nothing is differentiated.

    Raises:
      FileNotFoundError, ValueError: as of `load_model`; or config.json's id2label does not name the labels 0 to C - 1.
    """
    dtype = None if dtype is None else _check_dtype(dtype)
    directory = resolve_model(path_or_hub_id)
    fields, source = read_json_object(directory / "config.json"), str(directory / "config.json")
    if fields.get("model_type", "llama") != "llama":
        raise ValueError(f"{source}: field 'model_type': found {fields['model_type']!r}, expected 'llama', of a "
                         "classifier: not supported")
    # Nobody asks for next tokens: with tied embeddings there is no lm_head to look for.
    config = dataclasses.replace(LlamaConfig.from_hugging_face(fields, source), tie_word_embeddings=True)
    names = fields.get("id2label")
    numbers = [str(number) for number in range(len(names))] if isinstance(names, dict) else []
    if not numbers or set(names) != set(numbers) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{source}: field 'id2label': found {names!r:.80}, expected the names of labels 0, 1, …")
    head = Site(("score",), None, True, (len(numbers), config.hidden_size))
    dtype, parts = _find_tensors(directory, config, {**tensor_sites(config), "score.weight": head}, dtype)
    model = Llama(config, None, dtype, "none")
    shapes = {**tree_shapes(model)["params"], "score": jax.ShapeDtypeStruct(head.shape[::-1], dtype)}
    frozen = _load_tree(shapes, parts, dtype)
    return Classifier(model, frozen, frozen.pop("score"), tuple(names[number] for number in numbers),
                      fields.get("problem_type"))


def _find_tensors(directory: Path, config: LlamaConfig, sites: dict[str, Site], dtype: Any
                  ) -> tuple[Any, dict[tuple[str, ...], list[tuple[Site, files.StoredTensor]]]]:
    """The dtype to load in, and what each leaf of the tree is made of; all names, shapes and dtypes checked."""
    paths = tensor_files(directory)
    found = {name: tensor for name, tensor in files.read_headers(paths).items()
             if not name.endswith("rotary_emb.inv_freq")
             and not (config.tie_word_embeddings and name == "lm_head.weight")}
    files.check_tensors(found, {name: site.shape for name, site in sites.items()},
                        paths[0] if len(paths) == 1 else directory / INDEX)
    if dtype is None:
        dtype = _check_dtype(functools.reduce(jnp.promote_types, {DTYPES[tensor.dtype] for tensor in found.values()}))
    parts: dict[tuple[str, ...], list[tuple[Site, files.StoredTensor]]] = {}
    for name, site in sites.items():
        parts.setdefault(site.path, []).append((site, found[name]))
    return dtype, parts


def _load_tree(shapes, parts, dtype):
    def load(key_path, shapes):
        return _load_leaf(shapes, dtype, parts[tuple(key.key for key in key_path)])

    return jax.tree_util.tree_map_with_path(load, shapes, is_leaf=lambda x: isinstance(x, Quantised))


def save_model(model: Llama, frozen, directory: str | os.PathLike, tokenizer_from: str | os.PathLike | None = None, *,
               max_shard_bytes: int = files.MAX_SHARD_BYTES) -> Path:
    """Writes weights, e.g. of `merge_adapter`, as a Hugging Face directory that transformers reads.

    Host memory holds one shard at a time. config.json is put in place last: without it, there is no model. Weights are
    written as they are: for all digits of float16 files, load and merge with dtype=float16 or float32.

    Args:
      model: the architecture; its dtype is written into config.json.
      frozen: base weights, leaves [L, ...] of the model's shapes and dtype.
      directory: created if needed; must not hold a model.
      tokenizer_from: a model directory, hub id or GGUF file whose tokenizer files and bos, eos and pad ids are copied.
      max_shard_bytes: largest size of one safetensors file, in bytes, if no tensor alone exceeds it.

    Raises:
      FileExistsError: there is a model in that directory.
      ValueError: a leaf's shape or dtype is not the model's, or tokenizer_from has no tokenizer.
    """
    directory = Path(directory).expanduser()
    files.refuse_existing_model(directory)
    check_tree(frozen, tree_shapes(model)["params"], "save_model: weight")
    fields: dict[str, Any] = dict.fromkeys(TOKEN_IDS)
    copied: list[Path] = []
    if tokenizer_from is not None:
        source = resolve_model(tokenizer_from)
        copied = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
        if not any(path.name in ("tokenizer.json", "tokenizer.model") for path in copied):
            raise ValueError(f"{source}: found no tokenizer.json, expected the tokenizer to be copied")
        original = read_json_object(source / "config.json")
        fields = {name: original.get(name) for name in TOKEN_IDS}
    # torch_dtype is transformers 4's name of dtype.
    name = jnp.dtype(model.dtype).name
    fields = {**model.config.to_hugging_face(), **fields, "dtype": name, "torch_dtype": name}
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)}

    def read(site: Site) -> np.ndarray:
        leaf = leaves[site.path]
        value = np.asarray(leaf if site.layer is None else _take_layer(leaf, site.layer))
        return value.T if site.transposed else value

    itemsize = jnp.dtype(model.dtype).itemsize
    tensors = [files.NewTensor(name, math.prod(site.shape) * itemsize, functools.partial(read, site))
               for name, site in tensor_sites(model.config).items()]
    with files.staging(directory) as temporary:
        files.write_shards(temporary, tensors, max_shard_bytes)
        for path in copied:
            shutil.copyfile(path, temporary / path.name)
        write_json(temporary / "config.json", fields)
        files.publish(temporary, directory, "config.json")
    return directory


@jax.jit
def _take_layer(leaf, layer):
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def check_tree(tree, shapes, what: str) -> None:
    """Raises ValueError, beginning with `what`, unless the leaves' paths, shapes and dtypes are those of `shapes`."""
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for path, expected in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path)
        if name not in found:
            raise ValueError(f"{what} {name}: missing, expected {expected.dtype}{list(expected.shape)}")
        leaf = found.pop(name)
        if (leaf.shape, leaf.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{what} {name}: found {leaf.dtype}{list(leaf.shape)}, "
                             f"expected {expected.dtype}{list(expected.shape)}")
    if found:
        raise ValueError(f"{what} {next(iter(found))}: found, expected no such weight")
