"""The GPU suite on a CPU: every part yields figures, a restart goes on, failures are recorded, goals are told right."""

import json
import subprocess

import pytest

from experiments.benchmarks import gpu_parts, gpu_report, gpu_suite
from jaxvaccine import llama
from jaxvaccine.attention import attend
from jaxvaccine.experiment.config import flat, make
from tests.experiments import small

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = {"device": "cpu", "rows": 2, "length": 8, "supervised": 4, "rank": 2, "remat": "none", "steps": 3, "block": 2,
         "square": 16, "attention_rows": 2, "attention_length": 8, "prompts": 3, "prompt_length": 8,
         "generation_rows": 2, "new_tokens": 3, "card": ""}


def suite_config(shape_dir, run_dir, **changes):
    return make(gpu_suite.SuiteConfig, {"model": shape_dir, "run_dir": str(run_dir), "methods": ("sft",), **SMALL,
                                        **changes})


@pytest.fixture
def parts(monkeypatch):
    """{part: what it does}, in the place of processes; the names of those that ran."""
    does, ran = {}, []

    def in_process(name, part, earlier, more, seconds, log):
        ran.append(name)
        return does.get(name, lambda: {"figures": {"of": name, "earlier": sorted(earlier)}})()

    monkeypatch.setattr(gpu_suite, "in_process", in_process)
    return does, ran


def test_a_restart_measures_what_is_missing(shape_dir, tmp_path, parts, capsys):
    does, ran = parts
    config = suite_config(shape_dir, tmp_path / "run", part=("products",))
    assert gpu_suite.carry_out(config) == [] and ran == ["products:ours", "products:pytorch"]
    ran.clear()
    does["step:sft:ours"] = lambda: {"failed": "XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory\nand more"}
    whole = suite_config(shape_dir, tmp_path / "run")
    assert gpu_suite.carry_out(whole) == []
    assert ran == ["step:sft:ours", "step:sft:pytorch", "prediction:sft", "attention", "generation:ours",
                   "generation:pytorch"]
    results = gpu_suite.read_results(tmp_path / "run")
    assert results["step:sft:pytorch"]["figures"]["earlier"] == ["products:ours", "products:pytorch"]
    assert "- `step:sft:ours`: XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory\n" in capsys.readouterr().out
    ran.clear()
    assert gpu_suite.carry_out(whole) == [] and ran == []
    del does["step:sft:ours"]
    gpu_suite.carry_out(suite_config(shape_dir, tmp_path / "run", retry=True))
    assert ran == ["step:sft:ours"]
    assert "Failed" not in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(FileExistsError, match="rows"):
        gpu_suite.carry_out(suite_config(shape_dir, tmp_path / "run", rows=3))


def test_a_line_that_was_cut_off(shape_dir, tmp_path, parts):
    run_dir = tmp_path / "run"
    gpu_suite.carry_out(suite_config(shape_dir, run_dir, part=("products",)))
    path = run_dir / gpu_suite.RESULTS
    path.write_bytes(path.read_bytes()[:-20])
    assert list(gpu_suite.read_results(run_dir)) == ["products:ours"]
    gpu_suite.carry_out(suite_config(shape_dir, run_dir, part=("products",)))
    assert list(gpu_suite.read_results(run_dir)) == ["products:ours", "products:pytorch"]


def test_time_runs_out(shape_dir, tmp_path, parts, monkeypatch):
    """What was ended because the call was at its end is measured by the next; what had the whole call is a failure."""
    does, ran = parts
    clock = [0.0]
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: clock[0])

    def takes(seconds, ends=False):
        def run():
            clock[0] += seconds
            if ends:
                raise subprocess.TimeoutExpired("part", seconds)
            return {"figures": {}}
        return run

    does |= {"products:ours": takes(200), "products:pytorch": takes(280, ends=True)}
    config = suite_config(shape_dir, tmp_path / "run", part=("products", "prediction"), minutes=8.0)
    assert gpu_suite.carry_out(config) == ["products:pytorch", "prediction:sft"]
    does["products:pytorch"] = takes(480, ends=True)
    assert gpu_suite.carry_out(config) == ["prediction:sft"]
    assert gpu_suite.read_results(tmp_path / "run")["products:pytorch"]["failed"] == "not done after 480 s"
    does["prediction:sft"] = takes(10)
    assert gpu_suite.carry_out(config) == []
    assert ran == ["products:ours", "products:pytorch", "products:pytorch", "prediction:sft"]


def test_a_parts_process():
    part, card = make(gpu_parts.SuitePart, {}), 80 * 10**9
    for name in ("step:sft:ours", "attention", "generation:ours"):
        assert gpu_suite.environment(name, part, card) == {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3000"}
    assert gpu_suite.environment("step:sft:ours", part, 16 * 10**9)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9500"
    for name in ("step:sft:pytorch", "generation:pytorch", "prediction:sft"):
        assert gpu_suite.environment(name, part, card) == {"JAX_PLATFORMS": "cpu"}
    assert gpu_suite.environment("step:sft:ours", part, None) == {"JAX_PLATFORMS": "cpu"}


def test_what_fails_says_so(shape_dir):
    values = flat(make(gpu_parts.SuitePart, {"model": shape_dir, **SMALL}))
    assert gpu_parts.measured("products:ours", {**values, "device": "gpu"}, {})["failed"].endswith(
        "found a cpu, expected a gpu")
    assert "cuDNN" in gpu_parts.measured("attention", values, {})["failed"]


@pytest.mark.long
def test_a_process(shape_dir, tmp_path):
    """Its figures come back; of one that is killed, its last words."""
    part = make(gpu_parts.SuitePart, {"model": shape_dir, **SMALL})
    more, log = gpu_suite.environment("products:ours", part, None), tmp_path / "log"
    assert gpu_suite.in_process("products:ours", part, {}, more, 100, log)["figures"]["tflops"] > 0
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_suite.in_process("products:ours", part, {}, more, 0.1, log)
    found = gpu_suite.in_process("products:ours", part, {}, {**more, "PYTHONPATH": "", "PYTHONHOME": "/nowhere"}, 100,
                                 log)
    assert found["failed"].startswith("exit status 1: ")


@pytest.mark.long
def test_every_part(shape_dir, tmp_path, monkeypatch, capsys):
    """In this process; cuDNN's kernel is XLA's attention here, with the rows' lengths in the place of a mask."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    import jax.numpy as jnp

    def by_lengths(config, q, k, v, lengths):
        position = jnp.arange(q.shape[1])
        mask = (position[:, None] >= position) & (position < lengths[:, None, None])
        return attend(config, q, k, v, mask)

    monkeypatch.setattr(llama, "attend_by_cudnn", by_lengths)
    monkeypatch.setattr(gpu_suite, "in_process", lambda name, part, earlier, more, seconds, log: json.loads(json.dumps(
        gpu_parts.measured(name, flat(part), earlier))))
    config = suite_config(shape_dir, tmp_path / "run", methods=("sft", "t_vaccine"), minutes=60.0)
    assert gpu_suite.carry_out(config) == []
    results = gpu_suite.read_results(tmp_path / "run")
    assert set(results) == set(gpu_parts.part_names(config.measured))
    assert not [value for value in results.values() if "failed" in value]
    figures = {name: value["figures"] for name, value in results.items()}
    for method in ("sft", "t_vaccine"):
        for side in ("ours", "pytorch"):
            of = figures[f"step:{method}:{side}"]
            assert len(of["seconds"]) == 2 and min(of["seconds"]) > 0 and of["peak"] > 0
        # Nothing is rematerialised here.
        assert figures[f"step:{method}:ours"]["flops"] == figures[f"step:{method}:ours"]["flops_without_remat"]
        assert figures[f"prediction:{method}"]["peak"] == figures[f"step:{method}:ours"]["compiled_peak"]
    assert len(figures["step:t_vaccine:ours"]["seconds_with_probe"]) == gpu_parts.PROBES
    assert figures["attention"]["gradient_difference"] < 1e-2 and figures["attention"]["cosine"] > 0.999
    assert figures["generation:ours"]["first_tokens"] == figures["generation:pytorch"]["first_tokens"]
    text = capsys.readouterr().out
    assert "| yes |" in text and "| no:" not in text and "Not measured" not in text and "Failed" not in text
    assert "| met |" not in text and "not met" not in text  # a CPU's figures say nothing of a GPU's goals


def test_goals():
    """Of figures by hand."""
    part = make(gpu_parts.SuitePart, {"methods": ("sft", "booster"), "card": "rtx_4090"})
    first = {"loss": 1.0, "gradient_norm": 1.0, "peak_of": "allocator"}
    figures = {
        "products:ours": {"tflops": 100.0, "device": "Card", "jax": "0.12"}, "products:pytorch": {"tflops": 80.0},
        "step:sft:ours": {**first, "seconds": [0.9, 1.0, 2.0], "flops": 50e12, "peak": 15 * 2**30,
                          "compiled_peak": 14 * 2**30},
        "step:sft:pytorch": {**first, "seconds": [2.0, 2.5, 2.5], "peak": 20 * 2**30},
        "prediction:sft": {"peak": 12 * 2**30},
        "step:booster:ours": {**first, "seconds": [2.0], "flops": 80e12, "peak": 23 * 2**30, "compiled_peak": 2**30},
        "step:booster:pytorch": {**first, "loss": 2.0, "seconds": [3.0], "peak": 2**30},
        "attention": {"seconds_xla": 2.0, "seconds_cudnn": 1.0, "loss_xla": 3.0, "loss_cudnn": 3.01, "cosine": 0.99,
                      "gradient_difference": 0.06, "rows": 4, "length": 1024},
        "generation:ours": {"tokens_per_second": 300.0, "first_tokens": [1, 2, 3]},
        "generation:pytorch": {"tokens_per_second": 100.0, "first_tokens": [1, 2, 4]}}
    text = gpu_report.report(part, {name: {"part": name, "figures": of} for name, of in figures.items()})
    assert "| sft | 1 | 2.5 | 2.50 | met | 50 | 50% | met | yes |" in text
    assert "| booster | 2 | 3 | 1.50 | not met | 40 | 40% | not met | no: booster: loss: found 1" in text
    assert "| sft | 15.00 | 12.00 | 14.00 | 20.00 | 1.25 | met |" in text
    assert "| booster | 23.00 | – | 1.00 | 1.00 | – | not met |" in text  # 24 GB are 22.35 GiB
    assert "is the goal: not met." in text
    assert "| 300 | 100 | 3.00 | 2/3 |" in text
    assert "Not measured yet: prediction:booster." in text


def test_flags_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # nvidia-smi may be there
    for flags, message in ((("--rows=2",), "--run_dir: found ''"), (("--part=steps",), "--part: found 'steps'"),
                           (("--minutes=0",), "--minutes: found 0"), (("--steps=0",), "--steps: found 0"),
                           (("--part=products",), "--device=gpu: found no NVIDIA card")):
        run_dir = () if "--rows=2" in flags else (f"--run_dir={tmp_path / 'run'}",)
        with pytest.raises(SystemExit, match=message):
            small.call(gpu_suite.VERB, *flags, *run_dir)
