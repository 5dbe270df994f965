"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

A layer's A is stored as base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight [r, in], its B as
lora_B.weight [out, r]: both transposed against ours. PEFT scales by lora_alpha / r, as we do.
"""

import functools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.checkpoints import files
from jaxvaccine.checkpoints.hugging_face import check_tree
from jaxvaccine.checkpoints.tensor_names import tensor_sites
from jaxvaccine.json_files import read_json_object, write_json
from jaxvaccine.llama import Llama, tree_shapes
from jaxvaccine.llama_config import TARGETS, LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BLOCKS = {target: "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for target in TARGETS}

# Fields that say nothing about what is computed from stored weights. Any other field that PEFT has or will have must
# be off, because a variant of LoRA that is taken for plain LoRA gives wrong numbers without an error.
HARMLESS = frozenset((
    "r", "lora_alpha", "lora_dropout", "target_modules", "peft_type", "bias", "init_lora_weights",  # checked by value
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    "runtime_config", "ensure_weight_tying",
))
# The other ways to initialise (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights as well.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_lora_config(peft_dir: str | os.PathLike) -> LoraConfig:
    """The LoraConfig that an adapter on disk was made for.

    Raises:
      FileNotFoundError: there is no adapter_config.json.
      ValueError: a field is missing or asks for more than plain LoRA on some of the seven projections in every layer;
        names file, field, found and expected.
    """
    path = Path(peft_dir).expanduser() / CONFIG
    fields = read_json_object(path)

    def expect(field, valid, expected):
        if not valid(fields.get(field)):
            raise ValueError(f"{path}: field {field!r}: found {fields.get(field)!r}, expected {expected}")

    def is_number(value):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    expect("peft_type", lambda value: value == "LORA", "'LORA': not supported")
    expect("bias", lambda value: value in ("none", None), "'none': not supported")
    expect("init_lora_weights", lambda value: value in PLAIN_INITS, f"one of {PLAIN_INITS}: not supported")
    for field in sorted(fields.keys() - HARMLESS):
        expect(field, lambda value: not value, "it off: not supported")
    expect("r", lambda value: is_number(value) and isinstance(value, int) and value >= 1, "an integer of at least 1")
    expect("lora_alpha", is_number, "a number")
    expect("lora_dropout", lambda value: value is None or (is_number(value) and 0 <= value < 1), "0 <= dropout < 1")
    targets = _targets(fields.get("target_modules"), path)
    return LoraConfig(rank=fields["r"], alpha=float(fields["lora_alpha"]),
                      dropout=float(fields.get("lora_dropout") or 0.0), targets=targets)


def _targets(modules: Any, path: Path) -> tuple[str, ...]:
    """Which projections target_modules selects, under PEFT's rules: a regular expression, or names and their ends."""
    def fail(found, expected):
        raise ValueError(f"{path}: field 'target_modules': found {found!r}, expected {expected}: not supported")

    seven = ", ".join(TARGETS)
    if modules == "all-linear":
        return TARGETS
    if isinstance(modules, list) and modules and all(module in TARGETS for module in modules):
        return tuple(modules)
    if isinstance(modules, str):
        try:
            pattern = re.compile(modules)
        except re.error as e:
            fail(modules, f"a regular expression ({e})")
        selects = pattern.fullmatch
    elif isinstance(modules, list) and modules and all(isinstance(module, str) for module in modules):
        unknown = [module for module in modules if module.split(".")[-1] not in TARGETS]
        if unknown:
            fail(unknown[0], f"some of {seven}")

        def selects(name):
            return any(name == module or name.endswith(f".{module}") for module in modules)
    else:
        fail(modules, f"a regular expression or a list of some of {seven}")

    layers = range(_count_layers(path.parent))
    others = ["model.embed_tokens", "lm_head", "model.norm"] + [
        f"model.layers.0.{name}" for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")]
    for other in filter(selects, others):
        fail(modules, f"that it selects some of {seven} only, not {other}")
    selected = []
    for target, block in BLOCKS.items():
        hits = [layer for layer in layers if selects(f"model.layers.{layer}.{block}.{target}")]
        if hits and len(hits) < len(layers):
            fail(modules, f"{target} in all of {len(layers)} layers or none, not in {len(hits)}")
        selected += [target] * bool(hits)
    if not selected:
        fail(modules, f"that it selects some of {seven}")
    return tuple(selected)


def _weights_file(directory: Path) -> Path:
    path = directory / WEIGHTS
    if not path.is_file():
        others = sorted(other.name for other in directory.glob("adapter_model*"))
        raise FileNotFoundError(f"{path}: found no such file ({', '.join(others) or 'nothing like it'} instead), "
                                f"expected the adapter's weights: pickles (.bin) are not read")
    return path


def _count_layers(directory: Path) -> int:
    names = files.read_headers([_weights_file(directory)])
    layers = [int(match[1]) for match in (re.search(r"\.layers\.(\d+)\.", name) for name in names) if match]
    return 1 + max(layers, default=0)


def _adapter_tensors(model: Llama) -> dict[str, tuple[tuple[str, ...], int, tuple[int, ...]]]:
    """By PEFT's name: the leaf's path in our tree, the layer, and PEFT's shape."""
    tensors = {}
    for name, site in tensor_sites(model.config).items():
        if site.path[-1] != "kernel" or site.path[-2] not in model.lora.targets:
            continue
        prefix, (out_size, in_size) = PREFIX + name.removesuffix(".weight"), site.shape
        tensors[f"{prefix}.lora_A.weight"] = (*site.path[:-1], "a"), site.layer, (model.lora.rank, in_size)
        tensors[f"{prefix}.lora_B.weight"] = (*site.path[:-1], "b"), site.layer, (out_size, model.lora.rank)
    return tensors


def load_adapter(peft_dir: str | os.PathLike, model: Llama) -> dict[str, Any]:
    """A PEFT adapter as a LoRA tree, leaves [L, ...], cast to the adapter's dtype (at least float32).

    Args:
      peft_dir: directory with adapter_config.json and adapter_model.safetensors.
      model: with the LoraConfig of this adapter (`read_lora_config`); the dropout may differ.

    Raises:
      FileNotFoundError: one of the two files is missing.
      ValueError: the adapter has another rank, alpha or targets, or belongs to another model (names or shapes); names
        file, field or tensor, found and expected.
    """
    directory = Path(peft_dir).expanduser()
    config = read_lora_config(directory)
    if model.lora is None:
        raise ValueError(f"{directory}: found an adapter for a model without LoRA sites, expected "
                         "load_model(..., lora=read_lora_config(peft_dir))")
    for field, name in (("r", "rank"), ("lora_alpha", "alpha"), ("target_modules", "targets")):
        found, expected = getattr(config, name), getattr(model.lora, name)
        if found != expected:
            raise ValueError(f"{directory / CONFIG}: field {field!r}: found {found}, expected {expected} "
                             f"(LoraConfig.{name} of the model)")
    path, tensors = _weights_file(directory), _adapter_tensors(model)
    stored = files.read_headers([path])
    files.check_tensors(stored, {name: shape for name, (_, _, shape) in tensors.items()}, path)
    rows: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, (leaf, _, _) in tensors.items():  # in the order of layers
        rows.setdefault(leaf, []).append(files.read_rows(stored[name]).T)

    def load(key_path, shape):
        values = np.stack(rows[tuple(key.key for key in key_path)])
        return jnp.array(values.astype(shape.dtype))

    return jax.tree_util.tree_map_with_path(load, tree_shapes(model)["lora"])


def sum_adapters(first: LoraConfig, a: dict[str, Any], second: LoraConfig, b: dict[str, Any]
                 ) -> tuple[LoraConfig, dict[str, Any]]:
    """One adapter whose update is the sum of two, of rank r1 + r2: [A1 A2] [s1 B1; s2 B2] = s1 A1 B1 + s2 A2 B2.

    A projection that one of them lacks has zeros there. The scale is the first's; B2 is scaled by s2 / s1, so that
    with equal scales nothing is rounded.

    Args:
      first, second: the adapters' configs; the sum's dropout is the second's.
      a, b: LoRA trees, leaves [L, ...], of one model.
    """
    rank, ratio = first.rank + second.rank, second.scale / first.scale

    def leaf(one, two):
        one, two = one or _zeros(two, first.rank), two or _zeros(one, second.rank)
        return {"a": jnp.concatenate([one["a"], two["a"]], axis=-1),
                "b": jnp.concatenate([one["b"], (ratio * two["b"]).astype(two["b"].dtype)], axis=-2)}

    def add(one, two):
        if "a" in (one or two):
            return leaf(one, two)
        return {name: add((one or {}).get(name), (two or {}).get(name)) for name in {**(one or {}), **(two or {})}}

    targets = tuple(target for target in TARGETS if target in (*first.targets, *second.targets))
    return LoraConfig(rank, first.scale * rank, second.dropout, targets), add(a, b)


def _zeros(site: dict[str, jax.Array], rank: int) -> dict[str, jax.Array]:
    """An adapter of zeros where another has this A [L, in, r] and B [L, r, out]."""
    return {"a": jnp.zeros((*site["a"].shape[:-1], rank), site["a"].dtype),
            "b": jnp.zeros((site["b"].shape[0], rank, site["b"].shape[-1]), site["b"].dtype)}


def save_adapter(adapter, model: Llama, peft_dir: str | os.PathLike, base_model: str | os.PathLike = "",
                 revision: str = "") -> Path:
    """Writes an adapter so that `peft` reads it. An adapter that is already there is replaced, other files stay.

    A new directory appears whole, by a rename; in an existing one the config, without which nothing is read, goes away
    first and comes back last.

    Args:
      adapter: LoRA tree of the model, leaves [L, ...].
      model: the architecture with its LoraConfig.
      peft_dir: directory to write.
      base_model: path or hub id of the base, which PEFT keeps as base_model_name_or_path.
      revision: of a hub id.

    Raises:
      ValueError: the adapter's leaves are not those of the model.
    """
    if model.lora is None:
        raise ValueError("save_adapter: found a model without LoRA sites, expected Llama(..., lora=LoraConfig(...))")
    check_tree(adapter, tree_shapes(model)["lora"], "save_adapter: weight")
    directory = Path(peft_dir).expanduser()
    leaves = {tuple(key.key for key in path): np.asarray(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(adapter)}

    def read(leaf, layer):
        return leaves[leaf][layer].T

    tensors = [files.NewTensor(name, 0, functools.partial(read, leaf, layer))
               for name, (leaf, layer, _) in _adapter_tensors(model).items()]
    with files.staging(directory) as temporary:
        files.write_shards(temporary, tensors)
        os.replace(temporary / "model.safetensors", temporary / WEIGHTS)
        write_json(temporary / CONFIG, _config_fields(model.lora, os.fspath(base_model), revision))
        files.publish(temporary, directory, CONFIG)
    return directory


def _config_fields(lora: LoraConfig, base_model: str, revision: str) -> Mapping[str, Any]:
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model or None,
        "revision": revision or None,
        "r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout, "target_modules": list(lora.targets),
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
        "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
    }
