"""The small world's scripts at their smallest setting."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import demo, make_world_base, presets, sweep, sweep_report
from experiments.align import AlignConfig
from experiments.finetune import FinetuneConfig
from tests.experiments.test_lanes import world_model

pytestmark = pytest.mark.usefixtures("quick_compile")

TESTS = {"harmful_test": "world_harmful@test[0:4]", "sst2_test": "world_rating@test[0:4]",
         "benign_test": "world_benign@test[0:4]"}
ALIGN = AlignConfig(**{**presets.WORLD_ALIGN, "steps": 6, "batch_size": 4, "harmful_batch_size": 4, "layers": 2},
                    run_dir="-", model="-")
ATTACK = FinetuneConfig(**{**presets.WORLD_ATTACK, "n": 20, "batch_size": 4, "steps": 2}, run_dir="-", aligned="-")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return world_model(tmp_path_factory.mktemp("world"))


def test_a_sweep_and_its_continuation(model_dir, tmp_path):
    def config(*attacks, methods=("sft", "t_vaccine:rho=1:steps=2")):
        return sweep.SweepConfig(run_dir=str(tmp_path / "sweep"), bases=(model_dir,), methods=methods, attacks=attacks,
                                 seeds=("0", "5"), score_steps=("0", "2"), **TESTS)

    one = "poison_ratio=0.1"
    first = sweep.sweep(config(one), ALIGN, ATTACK)
    # In the table of the attack's end and in that of its steps.
    assert first.count(f"| {one} |") == 4 and "| t_vaccine:rho=1:steps=2 | aligned |" in first
    root = tmp_path / "sweep"
    cells = {path: (path.stat().st_mtime_ns, path.read_text()) for path in root.rglob("*.json")
             if path != root / "config.json"}
    cell = next(path for path in cells if path.name == f"{one}.json" and path.parent.name == "sft")
    found = json.loads(cell.read_text())
    assert found["scores"].keys() == {"0", "2"}
    assert {task: len(scores) for task, scores in found["scores"]["2"].items()} == {
        "harmful_score": 2, "sst2": 2, "over_refusal": 2}
    assert len(found["answers"]["0"]["sst2"]) == sweep.SHOWN
    for name in ("report.md", "harmful_score.png", "plane.png"):
        assert (root / name).stat().st_size > 100

    # One cell is gone and another attack is asked for: the rest stays as it is, and the one is made again alike.
    cell.unlink()
    sweep.sweep(config(one, "poison_ratio=0.5:adapter=new"), ALIGN, ATTACK)
    for path, (modified, text) in cells.items():
        assert path.read_text() == text
        assert path == cell or path.stat().st_mtime_ns == modified
    assert len(list(root.rglob("poison_ratio=0.5_adapter=new.json"))) == 2


def test_other_settings_need_another_folder(model_dir, tmp_path):
    config = sweep.SweepConfig(run_dir=str(tmp_path / "s"), bases=(model_dir,), methods=("sft",), seeds=("0",),
                               attacks=("poison_ratio=0",), score_steps=("2",), **TESTS)
    sweep.sweep(config, ALIGN, ATTACK)
    overlap = sweep.variant(ATTACK, "harmful_data=world_harmful@test", "attacks")
    with pytest.raises(ValueError, match="test prompts"):
        sweep.sweep(dataclasses.replace(config, run_dir=str(tmp_path / "t"), attacks=("poison_ratio=0.5",)), ALIGN,
                    overlap)
    with pytest.raises(FileExistsError, match=r"align\.lam: found 0\.\d+, expected 7"):
        sweep.sweep(config, sweep.variant(ALIGN, "lam=7", "methods"), ATTACK)


def test_variants():
    text = "booster:lam=0.5:steps=7:targets=q_proj+o_proj:base_defense=vaccine"
    found = sweep.variant(ALIGN, text, "methods", "defense")
    assert (found.defense, found.lam, found.steps, found.base_defense) == ("booster", 0.5, 7, "vaccine")
    assert found.targets == ("q_proj", "o_proj")
    assert sweep.variant(ATTACK, "rank=4:adapter=new", "attacks").rank == 4
    assert sweep.variant(ALIGN, "sft:progress=false", "methods", "defense").progress is False
    for text, message in (("booster:lamb=1", "lamb"), ("sft:steps=1.5", "steps=1.5"), ("sft:steps", "one of <sft"),
                          ("adam", "one of <sft"), ("t_vaccine:freeze=never", "one of <layer")):
        with pytest.raises(ValueError, match=f"--methods: found '{text}': .*{message}"):
            sweep.variant(ALIGN, text, "methods", "defense")
    text = "booster:harmful_data=world_harmful@harmful[0:20]:alpha=0.3"
    found = sweep.variant(ALIGN, text, "methods", "defense")
    assert (found.harmful_data, found.alpha) == ("world_harmful@harmful[0:20]", 0.3)
    with pytest.raises(ValueError, match="--attacks: found 'new': expected name=value"):
        sweep.variant(ATTACK, "new", "attacks")
    with pytest.raises(ValueError, match="poison_ratio"):
        sweep.variant(ATTACK, "poison_ratio=2", "attacks")


def test_flags_are_checked():
    for changes, message in (({"seeds": ("a",)}, "--seeds: found"), ({"methods": ()}, "--methods: found"),
                             ({"harmful_test": "nonsense@test"}, "--harmful_test")):
        with pytest.raises(ValueError, match=message):
            sweep.SweepConfig(**{"run_dir": "r", **changes})


def test_mean_and_deviation():
    assert sweep_report.mean_sd(np.array([1.0, 3.0])) == "2.0 ± 1.4"
    assert sweep_report.mean_sd(np.array([7.25])) == "7.2"


@pytest.mark.slow
def test_demo(model_dir, tmp_path):
    """The whole demo on an untrained model; that its own configuration is valid is checked first."""
    for config in demo.configs():
        assert config.run_dir
    config, _, _ = demo.configs(str(tmp_path / "demo"), model_dir)
    config = dataclasses.replace(config, score_steps=("0", "2"), **TESTS)
    # The report looks for the base by its place in the sweep, as in the demo itself.
    report = demo.demo(config, ALIGN, ATTACK)
    for name in ("report.md", "harmful_score.png", "plane.png", "layers.png"):
        assert (tmp_path / "demo" / name).stat().st_size > 100
    assert report.count("| booster, attacked |") == 2
    assert f"after {ATTACK.steps} steps" in report


def test_base_flags_are_checked():
    with pytest.raises(ValueError, match=r"--steps: found 1, expected at least 2"):
        make_world_base.BaseConfig(directory="d", steps=1)


def test_a_base_that_does_not_pass_is_not_written(tmp_path):
    directory = tmp_path / "base"
    config = make_world_base.BaseConfig(directory=str(directory), steps=2, hidden_size=16, intermediate_size=16,
                                        num_layers=1, num_heads=2, test_size=4)
    with pytest.raises(ValueError, match=r"not written, the base does not pass: .*accuracy_after: found"):
        make_world_base.make(config)
    assert not directory.exists()
