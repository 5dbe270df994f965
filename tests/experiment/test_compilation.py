"""Compiled programs outlive their process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from jaxvaccine.experiment.compilation import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
print(len(hits) > 0)
"""


def ran(tmp_path, **environment) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return subprocess.run([sys.executable, "-c", PROGRAM], check=True, text=True, stdout=subprocess.PIPE, env={
        **kept, "JAX_PLATFORMS": "cpu", "JAXVACCINE_CACHE": str(tmp_path / "cache"), **environment}).stdout.strip()


def test_a_second_process_does_not_compile(tmp_path):
    assert [ran(tmp_path), ran(tmp_path)] == ["False", "True"]
    folder, = (tmp_path / "cache" / "compiled").iterdir()
    assert len(folder.name) == 16 and list(folder.iterdir())


@pytest.mark.long
def test_a_directory_of_the_users(tmp_path):
    assert ran(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == "False"
    assert list((tmp_path / "mine").iterdir()) and not Path(tmp_path / "cache").exists()
