"""A paper's list: its settings, its cells as runs, and the published figures beside ours."""

import dataclasses
from types import SimpleNamespace

import pytest

from experiments.studies import published, reproduce
from jaxvaccine import cli
from jaxvaccine.experiment import plans, recipes
from jaxvaccine.experiment.config import flat, make
from jaxvaccine.experiment.plans import cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.run import check_given, make_settings
from tests.experiments import small
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")

DATA = {"alignment_data": "world_refusal@train[0:8]", "harmful_data": "world_harmful@harmful[0:8]"}
ATTACK_DATA = {"user_data": "world_rating@attack", "harmful_data": "world_harmful@attack"}
TESTS = {"harmful_test": "world_harmful@test[0:4]", "sst2_test": "world_rating@test[0:4]"}
REAL = ("--model=some/model", *(f"--{name}={value}" for name, value in (DATA | TESTS).items()),
        *(f"--attack_{name}={value}" for name, value in ATTACK_DATA.items()))


def parsed(*argv):
    """The config, what was given for each stage, and the settings, as the script reads them from a command line."""
    values = cli.verb_flags(reproduce.VERB)
    values(["", "--run_dir=r", *argv])
    config = make(reproduce.ReproduceConfig, cli.given(reproduce.SECTION, values))
    given = [cli.given(of, values) for of in (cli.ALIGNMENT, cli.ATTACK, cli.EVALUATION)]
    return config, given, make_settings(config, *given)


@pytest.mark.parametrize("paper", reproduce.LISTS)
@pytest.mark.parametrize("values, argv", [(reproduce.REDUCED, ()), (reproduce.FULL, REAL)], ids=["world", "real"])
def test_every_cell_is_a_valid_setting(paper, values, argv, tmp_path):
    config, given, settings = parsed(f"--paper={paper}", *argv)
    found, plan = config.panels(), config.make_plan()
    aligned, _ = cell_configs(settings, tmp_path, Cell("m", paper, "", 3))
    assert found == reproduce.LISTS[paper](values, flat(aligned))
    check_given(plan, settings, *given[:2])
    runs = set()
    for method, attack in plan.pairs:
        aligned, attacked = cell_configs(settings, tmp_path, Cell("m", method, attack, 3))
        assert aligned.run.seed == attacked.run.seed == 3 and attacked.model.aligned == aligned.run.run_dir
        runs.add((str(dataclasses.replace(aligned, run=None)), attack))
    assert len(runs) == len(plan.pairs) == len({
        cell_configs(settings, tmp_path, Cell("m", *pair, 3))[1].run.run_dir for pair in plan.pairs})
    # Every panel has the recipe itself among its values.
    for panel in found[2:]:
        assert any(point.method == paper for curve in panel.curves.values() for point in curve)


def test_recipes_are_the_published_ones_but_for_flags(tmp_path):
    _, _, settings = parsed("--paper=t_vaccine", "--rho=7", "--attack_epochs=3", "--dtype=bfloat16", *REAL)
    aligned, attacked = cell_configs(settings, tmp_path, Cell("some/model", "t_vaccine", "poison_ratio=0.1", 0))
    expected, found = recipes.alignment("t_vaccine", "t_vaccine"), flat(aligned)
    assert found["rho"] == 7
    assert {name: found[name] for name in expected if name != "rho"} == {
        name: value for name, value in expected.items() if name != "rho"}
    assert (attacked.training.epochs, attacked.adapter.lora_alpha, attacked.model.dtype, attacked.data.test_data) == (
        3, 1.0, "bfloat16", TESTS["harmful_test"])
    assert settings.scores.model.dtype == "bfloat16"


@pytest.mark.parametrize("left_out, message", [("sst2_test", "--sst2_test"), ("harmful_test", "--harmful_test")])
def test_scores_need_both_tests(left_out, message, tmp_path):
    with pytest.raises(SystemExit, match=f"{message}: found ''"):
        small.call(reproduce.VERB, f"--run_dir={tmp_path / 'r'}", *(
            arg for arg in REAL if not arg.startswith(f"--{left_out}=")),
            "--agnews_test=" if left_out == "sst2_test" else "--benign_test=world_benign@test[0:4]")
    assert not (tmp_path / "r").exists()


def test_flags_are_checked():
    for argv, message in ((("--run_dir=",), "--run_dir"), (("--seeds=a",), "--seeds: found"),
                          (("--model=",), "--model"), (("--model=a,b",), "--model: found .*expected one backbone"),
                          (("--paper=tar",), "--paper")):
        with pytest.raises(SystemExit, match=message):
            small.call(reproduce.VERB, "--run_dir=r", *argv)


def test_a_claim_of_drops(monkeypatch):
    monkeypatch.setattr(reproduce, "largest_drop", lambda found, cells, method: f"{method}: {found}, {cells}")
    assert reproduce.claim(SimpleNamespace(paper="booster"), "table", ["cell"], {}) == "booster: table, ['cell']"


def test_memory_is_measured():
    config, given, _ = parsed("--paper=t_vaccine")
    found = reproduce.claim(config, None, [], given[0])
    assert found.endswith("% (XLA's buffer assignment of a step, float32)")
    assert -50 < float(found.partition("%")[0]) < 50


def test_every_claim_has_a_source():
    assert set(published.CLAIMS) == set(published.TABLES) == set(reproduce.LISTS) == set(reproduce.TITLES)
    assert all("arXiv" in figure.source for of in published.TABLES.values() for figure in of)
    assert all("arXiv" in source for of in published.CLAIMS.values() for *_, source in of)


@pytest.mark.long
def test_a_list(world_model, tmp_path, monkeypatch):
    """Two methods and two attacks from the command line to the report; a second call repeats nothing."""
    def two(values, recipe):
        return [*plans.ratios(("sft", "booster"), ("0.5",)), *plans.samples(("sft",), ("20",), "")]

    monkeypatch.setitem(reproduce.LISTS, "booster", two)
    argv = ("--paper=booster", f"--run_dir={tmp_path / 'r'}", f"--model={world_model()}", *REAL[1:], "--steps=3",
            "--batch_size=2", "--harmful_batch_size=2", "--attack_n=8", "--attack_batch_size=2", "--attack_steps=2",
            "--attack_rank=32", "--max_length=64", "--attack_max_length=64", "--max_new_tokens=4", "--noprogress")
    small.call(reproduce.VERB, *argv)
    report = (tmp_path / "r" / "report.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("# ")] == [
        f"# Booster (arXiv 2409.01586), on {world_model()}"]
    assert report.count("\n| SFT | 0.5 | 8 |") == 2 and report.count("\n| SFT | 0.1 | 20 |") == 2
    assert rows_of(report, "| statement |")[1][:2] == ["largest drop of HS by Booster", "34.14%"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("adapter/adapter_model.safetensors")}
    assert len(times) == 5
    small.call(reproduce.VERB, *argv)
    assert (tmp_path / "r" / "report.md").read_text() == report
    assert times == {path: path.stat().st_mtime_ns for path in times}
