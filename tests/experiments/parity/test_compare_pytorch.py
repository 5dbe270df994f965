"""The comparison script, on the tiny model and on a model directory."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from experiments.parity import compare_pytorch
from experiments.parity import steps as parity
from jaxvaccine import cli
from jaxvaccine.json_files import read_json

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[3]


def command(run_dir, *flags):
    return subprocess.run([sys.executable, "-m", "experiments.parity.compare_pytorch", f"--run_dir={run_dir}", *flags],
                          cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("method", ["repnoise", "repnoise_booster"])
def test_the_reference_draws_the_same_noise_in_a_process_without_float64(method):
    """Numbers drawn in float32 are others, not the same rounded."""
    problem = parity.Problem(parity.tiny_config(**parity.METHODS[method]), "float64", "-", None, [])
    assert not jax.config.jax_enable_x64
    found = parity.repnoise_noise(problem, 3, 1, (2, 5))
    assert found.dtype == np.float64
    with jax.enable_x64(True):
        np.testing.assert_array_equal(found, parity.repnoise_noise(problem, 3, 1, (2, 5)))


@pytest.fixture
def in_this_process(monkeypatch):
    """Both sides here: a process of its own takes seconds to import its framework."""
    monkeypatch.setattr(compare_pytorch, "in_process", lambda function, *arguments: function(*arguments))


@pytest.mark.long
def test_command_line(tmp_path):
    """Half precision, with PyTorch against itself; then again, which compares nothing anew."""
    flags = ("--defense=t_vaccine", "--steps=2", "--dtype=bfloat16", "--remat=none")
    first = command(tmp_path / "run", *flags)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "| T-Vaccine |" in first.stdout and "| JAX − PyTorch in float32 |" in first.stdout
    assert {"config.json", "comparison.json", "divergence.png", "report.md"} <= {
        path.name for path in (tmp_path / "run").iterdir()}
    result = json.loads((tmp_path / "run" / "comparison.json").read_text())["t_vaccine"]
    threads = 1 if result["threads_pytorch"] > 1 else 2
    again, theirs, ours = (result["yardsticks"][name] for name in (
        f"PyTorch with {threads} thread(s) − PyTorch", "PyTorch − PyTorch in float32", "JAX − PyTorch in float32"))
    for step, repeated, their_error, our_error in zip(result["steps"], again, theirs, ours, strict=True):
        # bfloat16 has 8 bits: far from float32's differences, and still the same method.
        assert 1e-5 < step["gradient"] < 0.2 and step["cosine"] > 0.99 and step["loss"] < 0.05
        assert repeated["gradient"] <= step["gradient"]
        assert 1e-5 < our_error["gradient"] < 3 * their_error["gradient"]
        assert len(step["active_layers"]) == parity.TINY_FLAGS["layers"]
    before = (tmp_path / "run" / "comparison.json").stat().st_mtime_ns
    second = command(tmp_path / "run", *flags)
    assert second.returncode == 0 and (tmp_path / "run" / "comparison.json").stat().st_mtime_ns == before
    other = command(tmp_path / "run", *flags, "--seed=1")
    assert other.returncode == 1 and "seed: found 0, expected 1" in other.stderr


@pytest.mark.long
def test_on_a_model_directory(model_dir, tmp_path, in_this_process):
    config = compare_pytorch.CompareConfig(
        run_dir=str(tmp_path / "run"), model=model_dir, defense=("booster", "vaccine_booster"))
    methods = compare_pytorch.read_methods(config, {
        "steps": 2, "alignment_data": "embedded_refusal@train[0:8]", "harmful_data": "embedded_harmful@harmful[0:8]",
        "rank": 2, "batch_size": 2, "harmful_batch_size": 3, "max_length": 400, "remat": "none"})
    compare_pytorch.compare(config, methods)
    results = read_json(tmp_path / "run" / "comparison.json")
    assert set(results) == set(config.defense)
    for result in results.values():
        assert result["steps"][0]["gradient"] < 1e-5
        assert max(step["loss"] for step in result["steps"]) < 1e-4
        assert result["peak_memory_jax"] > 1e6 and result["peak_memory_pytorch"] > 1e6
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Booster on Vaccine" in report and "| Booster |" in report


@pytest.mark.parametrize("flags, message", [
    (("--defense=sgd",), r"--defense: found \('sgd',\), expected some of sft, vaccine"),
    (("--steps=0",), "--steps: found 0, expected at least 1"),
    (("--dtype=float64", "--model=some/where"), "--dtype: found 'float64', expected float32 or bfloat16"),
    (("--layers=5",), "--layers: found 5, expected at most the model's 4 layers"),
    (("--preset=sgd",), "--preset: found 'sgd', expected a paper's method, one of booster/sft, "),
])
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"^compare_pytorch: {message}"):
        cli.call("compare_pytorch", compare_pytorch.VERB, [f"--run_dir={tmp_path / 'run'}", *flags])
    assert not (tmp_path / "run").exists()


def test_bad_flags_end_the_program(tmp_path):
    failed = command(tmp_path / "run", "--model=no/such/folder.gguf")
    assert failed.returncode == 1 and failed.stderr.strip().splitlines()[-1].startswith("compare_pytorch: ")
    assert "no/such/folder.gguf" in failed.stderr
    assert not (tmp_path / "run").exists()
