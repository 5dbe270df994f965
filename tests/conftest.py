"""Fixtures of the whole suite."""

import gc

import jax
import pytest


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


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Compiled programs are forgotten after their module.

    XLA keeps each in memory maps of its own, of which Linux grants a process 65,530: a worker that goes through a large
    part of the suite would end in a segmentation fault while it compiles.
    """
    yield
    jax.clear_caches()
    gc.collect()
