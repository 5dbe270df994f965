"""The demos: `make demo` whole on an untrained model, and what both of them run."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest

from experiments import demo, demo_smollm2
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.plans import cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.run import check_given, make_settings
from tests.experiments import small
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_configuration_is_valid():
    config = demo.configuration()
    plan, settings = config.make_plan(), make_settings(config, {}, {}, {})
    assert config.run_dir and plan.backbones == ("world",) and plan.seeds == (0, 1)
    assert plan.methods == ("sft", "vaccine", "t_vaccine", "booster")
    assert plan.attacks == ("poison_ratio=0", "poison_ratio=0.1")
    assert plan.score_steps == tuple(recipes.WORLD_ATTACK["steps"] * part // 5 for part in range(1, 6))
    for method, attack in plan.pairs:
        aligned, attacked = cell_configs(settings, Path("r"), Cell("world", method, attack, 0))
        assert aligned.training.steps == recipes.WORLD_ALIGN["steps"] and attacked.adapter.adapter == "continue"


@pytest.mark.long
def test_the_demo(world_model, tmp_path):
    root = tmp_path / "demo"
    config = dataclasses.replace(demo.configuration(str(root), world_model()), score_steps=("1", "2"))
    text = demo.demo(config, {**small.ALIGN, "layers": 2}, small.ATTACK, {**small.TESTS, "loss_data": ""})
    assert text == (root / "report.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    # An untrained model answers everything with the same nonsense: of HS there is nothing to draw.
    assert set(shown) >= {"plane.png", "layers.png"} and "Not drawn: HS" in text
    assert {path.name for path in root.glob("*.png")} == set(shown)
    assert text.count("| Booster, attacked |") == text.count("| SFT, aligned |") == 2
    assert f"after {small.ATTACK['steps']} steps" in text and "depend on the machine" in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]
    rows = rows_of(text, "## Scores")
    assert [row[0] for row in rows[1:]] == [name for name in ("SFT", "Vaccine", "T-Vaccine", "Booster")
                                            for _ in range(3)]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("script", ["demo", "demo_smollm2"])
def test_they_take_no_flags(script, monkeypatch, capsys):
    """--help shows what they do, and does not do it."""
    def run(argument):
        monkeypatch.setattr(sys, "argv", [script, argument])
        runpy.run_module(f"experiments.{script}", run_name="__main__")

    run("--help")
    assert capsys.readouterr().out.startswith(f"`make {script.replace('_', '-')}`: ")
    with pytest.raises(SystemExit, match=f"^{script}: .*steps"):
        run("--steps=3")


def test_the_configuration_of_the_real_model():
    config = demo_smollm2.configuration("model", "runs/x")
    settings = make_settings(config, demo_smollm2.ALIGN, demo_smollm2.ATTACK, demo_smollm2.SCORES)
    plan = config.make_plan()
    check_given(plan, settings, demo_smollm2.ALIGN, demo_smollm2.ATTACK)
    assert plan.pairs == (("sft", "poison_ratio=0.1"), ("booster", "poison_ratio=0.1")) and plan.seeds == (0,)
    for method, attack in plan.pairs:
        aligned, attacked = cell_configs(settings, Path("runs/x"),
                                         Cell("model", method, attack, 0))
        assert aligned.model.model == "model" and attacked.model.aligned == aligned.run.run_dir
        assert attacked.data.test_data == settings.scores.tests.harmful_test
        assert attacked.data.bucket == aligned.data.bucket and attacked.run.save_every == aligned.run.save_every
        assert attacked.data.poison_ratio == 0.1
    assert aligned.method.lam == 1.0 and aligned.training.learning_rate == 1e-3
