"""Compiled programs are kept on disk, so that a command that goes on, or comes again, does not compile anew."""

import hashlib
import platform
from pathlib import Path

import jax

from jaxvaccine.checkpoints.files import cache_directory

MOST_BYTES = 4 * 2**30  # what was not used for longest is removed


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, unless it has a directory already.

    That is `compiled/` in our cache, for each kind of processor its own: JAX's key says nothing of what a CPU can do,
    and a home directory may be shared between machines. JAX_COMPILATION_CACHE_DIR names another,
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. Programs that compile in less than a second are not kept.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled" / _processor()))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _processor() -> str:
    """A short name of what this machine's processor can do."""
    found = [platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        found += sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]
