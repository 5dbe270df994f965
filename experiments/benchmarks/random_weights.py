"""Random weights that JAX and PyTorch each make where they lie, equal to the last bit: a hash of every weight's place.

Drawn with `jax.random`, a 7B model takes more memory than its training step does, and what a process has once held is
in its peak. A hash of an index is computed as it is written.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine import llama
from jaxvaccine.checkpoints.tensor_names import tensor_sites
from jaxvaccine.llama_config import LlamaConfig

DEVIATION = 0.02  # of a weight, as in transformers' initialisation; uniform
# MurmurHash3's last steps, after Knuth's multiplication.
SPREAD, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
CHUNK = 2**22  # weights that PyTorch computes at a time


def _seed(path: Sequence[str]) -> int:
    return zlib.crc32("/".join(path).encode())


def frozen(model: llama.Llama) -> Any:
    """Base weights in the model's dtype, [L, ...] stacked; norms and biases neutral."""
    return jax.jit(functools.partial(weights, model))()


def weights(model: llama.Llama) -> Any:
    """What `frozen` compiles: every weight by itself, with no temporary arrays."""
    def values(path: Sequence[str], shape: jax.ShapeDtypeStruct):
        if path[-1] in ("scale", "bias"):
            ones = path[-1] == "scale" and not model.config.family.offset_norms
            return jnp.full(shape.shape, float(ones), shape.dtype)
        h = jax.lax.iota(jnp.uint32, shape.size) * jnp.uint32(SPREAD) + jnp.uint32(_seed(path))
        h = (h ^ (h >> 16)) * jnp.uint32(FIRST)
        h = (h ^ (h >> 13)) * jnp.uint32(SECOND)
        unit = ((h ^ (h >> 16)) >> 8).astype(jnp.float32) * np.float32(2.0**-23) - 1
        return (unit * np.float32(DEVIATION * math.sqrt(3))).astype(shape.dtype).reshape(shape.shape)

    shapes = llama.tree_shapes(model)["params"]
    return jax.tree_util.tree_map_with_path(lambda path, shape: values([key.key for key in path], shape), shapes)


def fill(base: Any, config: LlamaConfig) -> None:
    """Writes the same weights into transformers' model, without an adapter, on whichever device it lies."""
    import torch

    sites = tensor_sites(config)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim == 1:
                continue  # as transformers makes them: neutral
            site = sites[name]
            rows, columns = parameter.shape
            of_row, of_column = (1, rows) if site.transposed else (columns, 1)
            first = (site.layer or 0) * rows * columns
            column = torch.arange(columns, dtype=torch.int64, device=parameter.device) * of_column
            step = max(1, CHUNK // columns)
            for start in range(0, rows, step):
                part = parameter[start:start + step]
                row = torch.arange(start, start + len(part), dtype=torch.int64, device=parameter.device) * of_row
                h = ((first + row[:, None] + column) * SPREAD + _seed(site.path)) & 0xFFFFFFFF
                h = ((h ^ (h >> 16)) * FIRST) & 0xFFFFFFFF
                h = ((h ^ (h >> 13)) * SECOND) & 0xFFFFFFFF
                unit = ((h ^ (h >> 16)) >> 8).float() * 2.0**-23 - 1
                part.copy_(unit * float(np.float32(DEVIATION * math.sqrt(3))))


def adapter(model: llama.Llama) -> Any:
    """A LoRA tree of numpy arrays, float32; B is not zero, so that every part of a gradient is at work."""
    rng = np.random.default_rng(0)

    def values(path, shape):
        bound = 1 / math.sqrt(shape.shape[1]) if path[-1].key == "a" else 0.01
        return rng.uniform(-bound, bound, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, llama.tree_shapes(model)["lora"])
