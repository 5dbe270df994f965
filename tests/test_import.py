"""What `import jaxvaccine` costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "tensorflow", "datasets", "orbax", "gguf", "huggingface_hub", "matplotlib", "pandas",
         "scipy.stats", "pyarrow", "fsspec", "tokenizers", "safetensors.torch", "tqdm")
PUBLIC = ("LoraConfig", "causal_lm_loss", "defenses", "init_adapter", "load_adapter", "load_model", "save_adapter")


def fresh(program):
    """The JSON that a fresh interpreter prints."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=root,
                          env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"})
    return json.loads(done.stdout)


def test_nothing_heavy_is_imported():
    program = "import jaxvaccine, json, sys; print(json.dumps([sorted(sys.modules), sorted(dir(jaxvaccine))]))"
    modules, names = fresh(program)
    assert "jaxvaccine" in modules
    assert [name for name in HEAVY if name in modules] == []
    assert [name for name in PUBLIC if name not in names] == []


@pytest.mark.long
def test_it_takes_two_seconds_at_most():
    """The best of three, since the machine may be busy; generously."""
    program = "import time; start = time.perf_counter(); import jaxvaccine; print(time.perf_counter() - start)"
    assert min(fresh(program) for _ in range(3)) < 4
