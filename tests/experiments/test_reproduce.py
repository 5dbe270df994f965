"""A paper's list: its settings, its cells as runs, and the published figures beside ours."""

import dataclasses
import json

import pytest
from absl import flags

from experiments import config_flags, panels, presets, published, reproduce
from experiments.align import AlignConfig
from experiments.evaluate import EvaluateConfig
from experiments.finetune import FinetuneConfig
from experiments.panels import Panel, Point
from experiments.published import Figure
from experiments.sweep_report import folder_name
from tests.experiments.test_lanes import world_model

pytestmark = pytest.mark.usefixtures("quick_compile")

DATA = {"alignment_data": "world_refusal@train[0:8]", "harmful_data": "world_harmful@harmful[0:8]"}
ATTACK_DATA = {"user_data": "world_rating@attack", "harmful_data": "world_harmful@attack"}
TESTS = {"harmful_test": "world_harmful@test[0:4]", "sst2_test": "world_rating@test[0:4]"}


@pytest.fixture
def parsed():
    """Reads a command line as the script does; the flags are gone afterwards."""
    def parse(*argv):
        values = flags.FlagValues()
        config_flags.define(reproduce.ReproduceConfig, flag_values=values)
        config_flags.define(AlignConfig, without=reproduce.ALIGN_WITHOUT, flag_values=values)
        config_flags.define(FinetuneConfig, "attack_", reproduce.ATTACK_WITHOUT, flag_values=values)
        config_flags.define(EvaluateConfig, without=reproduce.EVALUATE_WITHOUT, flag_values=values)
        values(["", *argv])
        config = config_flags.read(reproduce.ReproduceConfig, flag_values=values)
        return config, reproduce.read_recipes(config, values)

    return parse


REAL = ("--model=some/model", *(f"--{name}={value}" for name, value in (DATA | TESTS).items()),
        *(f"--attack_{name}={value}" for name, value in ATTACK_DATA.items()))


@pytest.mark.parametrize("paper", reproduce.LISTS)
@pytest.mark.parametrize("values, argv", [(reproduce.REDUCED, ()), (reproduce.FULL, REAL)], ids=["world", "real"])
def test_every_cell_is_a_valid_setting(paper, values, argv, parsed, tmp_path):
    _, recipes = parsed(f"--paper={paper}", "--run_dir=r", *argv)
    found = reproduce.LISTS[paper](values, dataclasses.asdict(recipes.align[paper]))
    pairs, settings = panels.cells(found), set()
    for method, attack in pairs:
        aligned, attacked = recipes.cell(tmp_path, method, attack, seed=3)
        assert aligned.seed == attacked.seed == 3 and attacked.aligned == aligned.run_dir
        settings.add((dataclasses.replace(aligned, run_dir="-"), attack))
    assert len(settings) == len(pairs) == len({recipes.cell(tmp_path, *pair, 3)[1].run_dir for pair in pairs})
    # Every panel has the recipe itself among its values.
    for panel in found[2:]:
        assert any(point.method == paper for curve in panel.curves.values() for point in curve)


def test_recipes_are_the_published_ones_but_for_flags(parsed):
    _, recipes = parsed("--paper=t_vaccine", "--run_dir=r", "--rho=7", "--attack_epochs=3", "--dtype=bfloat16", *REAL)
    expected = presets.ALIGN["t_vaccine"]
    found = recipes.align["t_vaccine"]
    assert found.rho == 7
    assert {name: getattr(found, name) for name in expected if name != "rho"} == {
        name: value for name, value in expected.items() if name != "rho"}
    attack = recipes.attack["t_vaccine"]
    assert (attack.epochs, attack.lora_alpha, attack.dtype, attack.test_data) == (
        3, 1.0, "bfloat16", TESTS["harmful_test"])
    assert recipes.scores.dtype == "bfloat16"


@pytest.mark.parametrize("left_out, message", [("sst2_test", "--sst2_test"), ("harmful_test", "--harmful_test")])
def test_scores_need_both_tests(left_out, message, parsed):
    with pytest.raises(ValueError, match=f"{message}: found ''"):
        parsed("--run_dir=r", *(arg for arg in REAL if not arg.startswith(f"--{left_out}=")),
               "--agnews_test=" if left_out == "sst2_test" else "--benign_test=world_benign@test[0:4]")


def test_flags_are_checked():
    for changes, message in (({"run_dir": ""}, "--run_dir"), ({"seeds": ("a",)}, "--seeds: found"),
                             ({"model": ""}, "--model")):
        with pytest.raises(ValueError, match=message):
            reproduce.ReproduceConfig(**{"run_dir": "r", **changes})


def write_cell(root, seed, point, hs, fa):
    path = root / f"seed{seed}" / folder_name(point.method) / f"{folder_name(point.attack)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {"0": {"harmful_score": [0.0], "agnews": [0.0]}, "9": {"harmful_score": [hs], "agnews": [fa]}}
    path.write_text(json.dumps({"scores": scores,
                                "intervals": {"harmful_score": [hs - 1, hs + 2], "agnews": [fa - 3, fa + 4]}}))


def test_published_figures_beside_ours(tmp_path, monkeypatch):
    monkeypatch.setitem(published.TABLES, "booster", (Figure("booster", "0.1", 1000, 20.0, 90.0, "M", "T", "paper"),))
    ratios = Panel("", "p", {name: [Point(p, name, f"poison_ratio={p}") for p in ("0", "0.1")]
                             for name in ("sft", "booster")})
    counts = Panel("", "n", {"booster": [Point("50", "booster", "poison_ratio=0.1:n=50")]})
    cells = reproduce.table_cells(ratios, counts, 1000)
    assert [(p, n) for _, p, n in cells] == [("0", 1000), ("0.1", 1000)] * 2 + [("0.1", 50)]
    hs = {("sft", "0", 1000): 10.0, ("sft", "0.1", 1000): 60.0, ("booster", "0", 1000): 5.0,
          ("booster", "0.1", 1000): 25.0, ("booster", "0.1", 50): 1.0}
    for point, p, n in cells:
        for seed in (0, 1):
            write_cell(tmp_path, seed, point, hs[point.method, p, n] + 2 * seed, 80.0)
    one, two = (reproduce.ReproduceConfig(run_dir=str(tmp_path), seeds=seeds) for seeds in (("0",), ("0", "1")))
    rows = reproduce.comparison(tmp_path, one, cells).splitlines()
    assert "| booster | 0.1 | 1000 | HS | 20.00 | 25.00 | +5.00 | 24.0–27.0 | paper: M, T |" in rows
    assert "| booster | 0.1 | 1000 | FA | 90.00 | 80.00 | -10.00 | 77.0–84.0 | paper: M, T |" in rows
    assert "| sft | 0.1 | 1000 | HS |  | 60.00 |  | 59.0–62.0 |  |" in rows
    assert len(rows) == 2 + 2 * len(cells)
    # Two seeds, 25 and 27: Student's interval 26 ± 12.7.
    assert "| 26.00 | +6.00 | 13.3–38.7 |" in reproduce.comparison(tmp_path, two, cells)
    assert reproduce.claim(tmp_path, one, None, cells) == "35.0 points, against sft at p = 0.1, n = 1000"


def test_memory_is_measured(parsed):
    config, recipes = parsed("--paper=t_vaccine", "--run_dir=r")
    found = reproduce.claim(None, config, recipes, [])
    assert found.endswith("% (XLA's buffer assignment of a step, float32)")
    assert -50 < float(found.partition("%")[0]) < 50


@pytest.mark.slow
def test_a_list(parsed, tmp_path, monkeypatch):
    """Two methods and two attacks from the command line's configs to the report; a second call repeats nothing."""
    def two(values, recipe):
        return [*panels.ratios(("sft", "booster"), values.ratios), *panels.samples(("sft",), values.counts)]

    monkeypatch.setitem(reproduce.LISTS, "booster", two)
    config, recipes = parsed("--paper=booster", f"--run_dir={tmp_path / 'r'}", f"--model={world_model(tmp_path)}",
                             *REAL[1:], "--steps=3", "--batch_size=2", "--harmful_batch_size=2", "--attack_n=8",
                             "--attack_batch_size=2", "--attack_steps=2", "--attack_rank=32", "--max_length=64",
                             "--attack_max_length=64", "--max_new_tokens=4", "--noprogress")
    values = reproduce.REDUCED._replace(ratios=("0.5",), counts=("12",))
    report = reproduce.reproduce(config, recipes, values)
    assert report.count("\n| sft | 0.5 | 8 |") == 2 and report.count("\n| sft | 0.1 | 12 |") == 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("adapter_model.safetensors")}
    assert len(times) == 5
    assert reproduce.reproduce(config, recipes, values) == report
    assert times == {path: path.stat().st_mtime_ns for path in times}
