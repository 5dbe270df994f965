"""Fixtures of the whole suite."""

import gc

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# An example may take as long as the machine takes: no test fails for being slow.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="module")
def float64():
    """Float64 in every test of a module that asks for it, and nowhere else."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compile():
    """XLA without most of its optimizations in a module: compiles in half the time, computes the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimized():
    """All of XLA's optimizations in one test of a module that compiles quickly."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Programs are kept on disk until the session ends: the same one, as that of a training step that every run builds
    anew or a random model's, is not compiled again."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Compiled programs are forgotten after their module.

    XLA keeps each in memory maps of its own, of which Linux grants a process 65,530: a worker that goes through a large
    part of the suite would end in a segmentation fault while it compiles.
    """
    yield
    jax.clear_caches()
    gc.collect()
