"""What a program takes of a GPU's memory, by XLA's own buffer assignment, compiled for a card that need not be there.

JAX compiles for a GPU by its description (`cards/*.textproto`), where the wheels of JAX's CUDA plugin are installed:
pip install "jax[cuda12]" in an environment of its own. Nothing is run. What a process takes beside the program is not
in it: the CUDA context (about 0.5 GiB), cuBLAS workspaces, and what JAX reserves beforehand (75% of the card, unless
XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise).
"""

from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30
FOLDER = resources.files("jaxvaccine") / "cards"
CARDS = tuple(sorted(file.name.removesuffix(".textproto") for file in FOLDER.iterdir()))
# Autotuning and Triton's products need a card that runs: without them products are cuBLAS's.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Memory(NamedTuple):
    """Bytes of a compiled program."""

    arguments: int  # what it is given: weights, adapter, optimizer, batches
    temporary: int  # what it holds beside them while it runs
    peak: int  # of both and of what it returns


def card_memory(card: str) -> int:
    """Bytes that the card has."""
    line = next(line for line in _description(card).splitlines() if "device_memory_size" in line)
    return int(line.split(":")[1])


def _description(card: str) -> str:
    return (FOLDER / f"{card}.textproto").read_text()


def card_device(card: str) -> jax.Device:
    """A device to compile for.

    Raises:
      ValueError: no such card, or JAX's CUDA plugin is not installed.
    """
    if card not in CARDS:
        raise ValueError(f"card: found {card!r}, expected one of {', '.join(CARDS)}")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_description(card), topology="1x1x1")
    except Exception as error:  # of the plugin's own kinds
        raise ValueError(f"card {card}: JAX can't compile for a GPU here ({error}); expected its CUDA plugin, "
                         'pip install "jax[cuda12]"') from error
    return topology.devices[0]


def program_memory(fn: Callable, *args: Any, device: jax.Device | None = None) -> Memory:
    """Memory of a jitted function, compiled for these arguments.

    Args:
      fn: of `jax.jit`; what it donates is counted once.
      args: ShapeDtypeStructs or arrays.
      device: as of `card_device`; None is the default device, of this machine.
    """
    options = None
    if device is not None:
        sharding, options = jax.sharding.SingleDeviceSharding(device), OPTIONS
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    of = fn.lower(*args).compile(compiler_options=options).memory_analysis()
    return Memory(of.argument_size_in_bytes, of.temp_size_in_bytes, of.peak_memory_in_bytes)


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays or ShapeDtypeStructs."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
