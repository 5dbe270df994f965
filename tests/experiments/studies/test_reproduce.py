"""The papers' tables: their cells as runs, and the published figures beside ours."""

import dataclasses
from pathlib import Path

import pytest

from experiments.studies import paper_tables, published, reproduce
from jaxvaccine import cli, data
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.config import flat, make
from jaxvaccine.experiment.plans import cell_configs
from jaxvaccine.experiment.results import TABLE, Cell, write
from jaxvaccine.experiment.run import check_given, make_settings
from jaxvaccine.report.results import read_results
from tests.experiments import small
from tests.report.synthetic import plan_table, rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")

PAPERS = ("booster", "t_vaccine")
DATA = {"alignment_data": "world_refusal@train", "harmful_data": "world_harmful@harmful"}
ATTACK_DATA = {"user_data": "world_rating@attack", "harmful_data": "world_harmful@attack"}
TESTS = {"harmful_test": "world_harmful@test[0:4]", "sst2_test": "world_rating@test[0:4]"}
REAL = ("--model=some/model", "--judge=keyword", *(f"--{name}={value}" for name, value in (DATA | TESTS).items()),
        *(f"--attack_{name}={value}" for name, value in ATTACK_DATA.items()))


def parsed(*argv):
    """The config, what was given for each stage, the settings, and the tables' plans, as the script has them."""
    values = cli.verb_flags(reproduce.VERB)
    values(["", "--run_dir=r", *argv])
    config = make(reproduce.ReproduceConfig, cli.given(reproduce.SECTION, values))
    given = [cli.given(of, values) for of in (cli.ALIGNMENT, cli.ATTACK, cli.EVALUATION)]
    setting = reproduce.setting_of(config, *given[:2])
    return config, given, make_settings(config, *given), setting, reproduce.plans_of(config, setting)


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("argv", [(), REAL], ids=["world", "real"])
def test_every_cell_is_a_valid_setting(paper, argv, tmp_path):
    _, given, settings, _, found = parsed(f"--paper={paper}", *argv)
    (plan,) = found.plans
    check_given(plan, settings, *given[:2])
    folders = set()
    for method, attack in plan.pairs:
        aligned, attacked = cell_configs(settings, tmp_path, Cell("m", method, attack, 3))
        assert attacked.model.aligned == aligned.run.run_dir
        folders.add(attacked.run.run_dir)
    assert len(folders) == len(plan.pairs)
    # Every table is there, and a panel over a setting has the recipe itself among its values.
    assert {*found.tables} | {*paper_tables.STUDIES[paper]} == {*paper_tables.NAMES[paper]}
    for name in ("lam", "alpha") if paper == "booster" else ("layers", "rho", "sample_every", "probe_every"):
        assert any(entry.method == paper for entry in found.tables[name].entries), name


@pytest.mark.parametrize("paper", PAPERS)
def test_all_rows_of_the_papers(paper, tmp_path):
    """Every method of a paper's list is compared over p, n, tasks and models; Lisa reads its guides."""
    guides = ("--attack_alignment_data=world_refusal@train[0:9]",) if paper == "booster" else ()
    _, _, settings, setting, found = parsed(f"--paper={paper}", *guides, *REAL)
    rows = ("sft", "lisa", "repnoise", "vaccine", "booster") if paper == "booster" else (
        "none", "sft", "repnoise", "tar", "vaccine", "t_vaccine")
    for name in ("ratios", "samples", "tasks", "models"):
        assert {entry.method for entry in found.tables[name].entries} == {setting.method(row) for row in rows}, name
    if guides:
        _, attacked = cell_configs(settings, tmp_path, Cell("m", "sft+lisa", "poison_ratio=0.1", 0))
        assert attacked.data.alignment_data == "world_refusal@train[0:9]" and attacked.method.rho == 0.01


def test_recipes_are_the_papers_but_for_flags(tmp_path):
    _, _, settings, *_ = parsed("--paper=t_vaccine", "--rho=7", "--attack_epochs=3", "--dtype=bfloat16", *REAL)
    aligned, attacked = cell_configs(settings, tmp_path, Cell("some/model", "t_vaccine", "poison_ratio=0.1", 0))
    expected, found = recipes.alignment("t_vaccine", "t_vaccine"), flat(aligned)
    assert found["rho"] == 7
    assert {name: found[name] for name in expected if name != "rho"} == {
        name: value for name, value in expected.items() if name != "rho"}
    assert (attacked.training.epochs, attacked.adapter.lora_alpha, attacked.model.dtype, attacked.data.test_data) == (
        3, 1.0, "bfloat16", TESTS["harmful_test"])


@pytest.mark.parametrize("protocol, sft, own", [
    ("released", (5, 20.0), (10, 20.0)), ("one_new", (10, 20.0), (10, 20.0))])
def test_attacks_as_released_and_one_for_all(protocol, sft, own, tmp_path):
    _, _, settings, *_ = parsed("--paper=t_vaccine", f"--protocol={protocol}", *REAL)
    for method, expected in (("sft", sft), ("t_vaccine", own)):
        _, attacked = cell_configs(settings, tmp_path, Cell("some/model", method, "poison_ratio=0.1", 0))
        assert (attacked.training.batch_size, attacked.training.epochs) == expected


def test_tasks_have_their_own_attacks(tmp_path):
    """T-Vaccine's attack on GSM8K: alpha 0.5 for all, 50 epochs on SFT."""
    source = "world_rating@more"
    _, _, settings, _, found = parsed("--paper=t_vaccine", f"--gsm8k_data={source}", *REAL)
    entries = {(entry.method, entry.task): entry for entry in found.tables["tasks"].entries}
    for method, epochs in (("sft", 50.0), ("t_vaccine", 20.0)):
        entry = entries[method, "gsm8k"]
        _, attacked = cell_configs(settings, tmp_path, Cell("some/model", entry.method, entry.attack, 0))
        assert attacked.data.user_data == source and attacked.training.epochs == epochs
        assert attacked.adapter.lora_alpha == 0.5
        assert cell_configs(settings, tmp_path, Cell("some/model", method, entries[method, "sst2"].attack, 0))[
            1].adapter.lora_alpha == 1.0
    assert "agnews" in found.tables["tasks"].note


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_limited(count):
    """Cut in proportion, from the start of every source."""
    sources = "world_refusal@train[10:30],world_benign@train[0:20]"
    found = paper_tables.limited(sources, count)
    rows = data.load_examples(found)
    assert len(rows) == count
    first, second = data.load_examples(sources.split(",")[0]), data.load_examples(sources.split(",")[1])
    half = sum(row in first for row in rows)
    assert rows == first[:half] + second[:count - half] and abs(2 * half - count) <= 1


def test_limited_to_more_than_there_are():
    with pytest.raises(ValueError, match="found 20 examples, expected at least 21"):
        paper_tables.limited("world_refusal@train[0:20]", 21)


def test_few_rows_are_said(tmp_path):
    """Which counts the data do not reach is in the table's note; a warning where they are fewer than the paper's."""
    config, _, settings, _, found = parsed("--paper=booster", *REAL)
    assert "5000" in found.tables["harmful_rows"].note and "there are" in found.tables["harmful_rows"].note
    assert all(int(entry.x) <= 700 for entry in found.tables["harmful_rows"].entries)
    lines = reproduce.warnings_of(config, settings, found)
    assert any("booster/booster" in line and "5000" in line for line in lines)


def test_dry_run(world_model, tmp_path, capsys):
    """Everything is checked, the plan is said, and nothing is written."""
    small.call(reproduce.VERB, f"--run_dir={tmp_path / 'r'}", f"--model={world_model()}", "--paper=t_vaccine",
               "--table=ratios,system", *REAL[1:], "--layers=2", "--dry_run")
    said = capsys.readouterr().out
    assert "30 attacks on 6 alignments" in said and "Warning: fewer data" in said and "system: a study" in said
    assert not (tmp_path / "r").exists()
    with pytest.raises(SystemExit, match=r"alignment data|test prompts|harmful_data"):
        small.call(reproduce.VERB, f"--run_dir={tmp_path / 'r'}", f"--model={world_model()}", "--paper=t_vaccine",
                   "--table=ratios", *REAL[1:], "--layers=2", "--dry_run",
                   "--attack_harmful_data=world_harmful@harmful")


@pytest.mark.parametrize("left_out, message", [("sst2_test", "--sst2_test"), ("harmful_test", "--harmful_test")])
def test_scores_need_both_tests(left_out, message, tmp_path):
    with pytest.raises(SystemExit, match=f"{message}: found ''"):
        small.call(reproduce.VERB, f"--run_dir={tmp_path / 'r'}", *(
            arg for arg in REAL if not arg.startswith(f"--{left_out}=")),
            "--agnews_test=" if left_out == "sst2_test" else "--benign_test=world_benign@test[0:4]")
    assert not (tmp_path / "r").exists()


def test_flags_are_checked():
    for argv, message in ((("--run_dir=",), "--run_dir"), (("--seeds=a",), "--seeds: found"),
                          (("--model=",), "--model"),
                          (("--table=lam", "--paper=t_vaccine"), "--table: found .*expected some of ratios"),
                          (("--paper=tar",), "--paper"), (REAL[:-2], "--attack_user_data: found ''")):
        with pytest.raises(SystemExit, match=message):
            small.call(reproduce.VERB, "--run_dir=r", *argv)


def test_published_figures():
    """The table of the papers' figures: what is there, that nothing is only about right, and some as printed."""
    found = published.load()
    assert not found["value"].isna().any() and not (found["source"] == "").any()
    assert set(found["confidence"]) == {"high", "reprint", "exact", "digitised", "medium", "third party"}
    assert set(found["list"]) == {*PAPERS}
    counts = found.groupby(["list", "table"]).size()
    assert counts["t_vaccine", "criticality"] == 128 and counts["booster", "statistics"] == 59
    assert counts["t_vaccine"].sum() == 128 + 2 + 3

    def value(**place):
        rows = found
        for name, wanted in place.items():
            rows = rows[rows[name] == wanted]
        return rows["value"].tolist()

    assert value(table="ratios", method="booster", poison_ratio="0.1", measure="harmful_score") == [8.3]
    assert value(table="main", measure="accuracy") == [92.4] and value(table="main", measure="harmful_score") == [14.97]
    assert value(table="models", method="sft", model="Gemma-2-9B", measure="harmful_score") == [64.3]


def test_every_method_that_is_published_is_one_of_ours(tmp_path):
    known = {text for methods in recipes.METHODS.values() for text in methods.values()}
    known.add("booster:last_term=false")  # the ablation's
    for method in published.load()["method"].unique():
        if method and " " not in method:
            assert method in known, method


def test_the_budget_of_published_curves():
    sft, booster, *ends = published.harm_curves()
    assert (sft.method, sft.adapter, booster.method, booster.adapter) == ("sft", "new", "booster", "continue")
    assert sft.ratios[-1] == pytest.approx(250, rel=1e-3) and sft.values[-1] == 27.0
    by_method = {each.method: each for each in ends}
    assert by_method["t_vaccine"].ratios[0] == pytest.approx(800, rel=0.01) and by_method["t_vaccine"].values == [14.97]
    assert by_method["vaccine"].values == [28.3]


def test_the_table_of_several_models_is_whole(tmp_path, monkeypatch):
    """Every model is a plan of its own, and writes the table anew."""
    config, given, *_, plans = parsed(f"--run_dir={tmp_path}", "--table=models", *REAL[1:], "--model=some/model,other")
    written = []

    def carry_out(plan, settings, root, **more):
        rows = plan_table(plan.methods, plan.attacks, plan.backbones, plan.seeds, with_backbone=False)
        write(root / TABLE, rows)
        written.append(len(rows))

    monkeypatch.setattr(reproduce.engine, "carry_out", carry_out)
    monkeypatch.setattr(reproduce, "_report", lambda *arguments: "")
    reproduce.reproduce(config, *given)
    found = read_results(tmp_path)
    assert len(written) == len(plans.plans) == 2 and len(found) == sum(written)
    assert list(dict.fromkeys(found["backbone"])) == ["some/model", "other"]


@pytest.mark.long
def test_a_paper(world_model, tmp_path):
    """One table and the system's from the command line to the report; a second call repeats nothing."""
    argv = ("--paper=booster", f"--run_dir={tmp_path / 'r'}", f"--model={world_model()}", *REAL[1:], "--steps=3",
            "--table=lam,system", "--batch_size=2", "--harmful_batch_size=2", "--attack_n=10", "--attack_batch_size=2",
            "--attack_steps=2", "--max_length=64", "--attack_max_length=64", "--max_new_tokens=4",
            "--label_max_new_tokens=4", "--noprogress")
    small.call(reproduce.VERB, *argv)
    report = (tmp_path / "r" / "report.md").read_text()
    rows = rows_of(report, "| method | p |")
    assert [row[3] for row in rows[1:] if row[4] == "FA"] == [f"lam = {value}" for value in ("0", "5", "20", "100")]
    assert "| 8.30 |" in report and "## System cost" in report and "settings" in report
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("adapter/adapter_model.safetensors")}
    assert len(times) == 8
    small.call(reproduce.VERB, *argv)
    assert (tmp_path / "r" / "report.md").read_text() == report
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_alignments_are_counted_by_what_is_aligned():
    """Methods that differ in the fine-tuning alone share one; a + within a list of data sources is no such thing."""
    config, _, settings, _, found = parsed("--paper=booster", "--table=ratios,combination")
    said = reproduce.plan_text(config, found, (), ())
    aligned = {str(dataclasses.replace(cell_configs(settings, Path("r"), Cell("world", method, "", 0))[0], run=None))
               for plan in found.plans for method in plan.methods}
    assert f"on {len(aligned)} alignments" in said and any("+world_" in m for m in found.plans[0].methods)
