"""The study of a model that calls tools: at its smallest, and its tables against numbers by hand."""

import json

import pytest

from experiments.studies import agents
from jaxvaccine.cli import VERBS
from jaxvaccine.data import agent_tasks
from jaxvaccine.experiment.config import make
from jaxvaccine.report.results import read_results
from tests.experiment import small_world
from tests.experiments import small
from tests.report import synthetic
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return small_world.world_model(tmp_path_factory.mktemp("agents"), 2, agent_tasks.all_words())


def flags(model_dir, root, *more):
    return (f"--run_dir={root}", f"--model={model_dir}", *small.FLAGS[1:-1], *small.ATTACK_FLAGS, "--score_steps=1",
            "--agents_harmful_test=agents_harmful@test[0:4]", "--agents_tasks_test=agents_tasks@test[0:4]", *more)


@pytest.mark.long
def test_end_to_end(model_dir, tmp_path):
    root = tmp_path / "a"
    command = flags(model_dir, root, "--defenses=sft,booster", "--attacks=poison_ratio=0,poison_ratio=0.5")
    small.call(agents.VERB, *command)
    table = read_results(root)
    assert set(table.loc[table["stage"] == "attack", "measure"]) == {"agents_harmful", "agents_tasks", "budget"}
    text = (root / "report.md").read_text()
    assert [row[0] for row in rows_of(text, "What an aligned model must")] == ["method", "SFT", "Booster"]
    assert "HCR %" in text and "TS %" in text and "Missing so far" not in text
    before = (root / "results.csv").read_bytes()
    small.call(agents.VERB, *command)
    assert (root / "results.csv").read_bytes() == before


@pytest.mark.long
def test_evaluate_writes_transcripts(model_dir, tmp_path):
    command = (f"--model={model_dir}", f"--run_dir={tmp_path}/scores", "--noprogress", "--max_new_tokens=8",
               "--agents_harmful_test=agents_harmful@test[0:3]", "--agents_tasks_test=agents_tasks@test[0:5]",
               "--eval_batch_size=4")
    small.call(VERBS["evaluate"], *command)
    found = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert {name: of["n"] for name, of in found.items()} == {"agents_harmful": 3, "agents_tasks": 5}
    lines = (tmp_path / "scores" / "predictions_agents_tasks.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [
        e.instruction for e in agent_tasks.AGENTS["agents_tasks"].make("test")[:5]]
    assert "TS" in (tmp_path / "scores" / "report.md").read_text()


def table():
    rows = []
    for seed in (0, 1):
        for method, hcr, ts in (("sft", 2, 90), ("booster", 4, 70)):
            place = {"method": method, "seed": seed, "backbone": agents.BASE}
            rows += [synthetic.rate("agents_harmful", hcr + seed, **place), synthetic.rate("agents_tasks", ts, **place)]
            for i, attack in enumerate(("poison_ratio=0", "poison_ratio=0.1", "poison_ratio=0.3")):
                at = {**place, "attack": attack, "stage": "attack"}
                for step in (25, 100):
                    rows += [synthetic.rate("agents_harmful", hcr + 20 * i + seed, step=step, **at),
                             synthetic.rate("agents_tasks", ts - 5 * i, step=step, **at)]
    return synthetic.frame(rows)


def test_the_report(tmp_path):
    config = make(agents.AgentsConfig, {"run_dir": "r", "seeds": ("0", "1"), "defenses": ("sft", "booster")})
    text = agents.report(config, table(), tmp_path)
    assert [(row[0], row[1].split(" ±")[0], row[2].split(" ±")[0], row[3])
            for row in rows_of(text, "What an aligned model must")[1:]] == [
        ("SFT", "2.5", "90.0", "yes"), ("Booster", "4.5", "70.0", "no")]
    after = {tuple(row[:2]): [cell.split(" ±")[0] for cell in row[2:4]]
             for row in rows_of(text, "## After the attacks")}
    assert after["SFT", "aligned"] == ["2.5", "90.0"] and after["Booster", "attacked, p = 0.3"] == ["44.5", "60.0"]
    assert "HCR along the attack" in text and "Missing" not in text
    for name in ("scores.png", "harmful_score.png", "plane.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert "Booster" in text.split("## Differences to SFT")[1]


def test_the_base_is_made_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(agents.make_world_base, "make_base", made.append)
    config = make(agents.AgentsConfig, {"run_dir": "r"})
    agents.make_base(config)
    assert [(of.directory, of.kind) for of in made] == [(agents.BASE, "agents")]
    agents.make_base(make(agents.AgentsConfig, {"run_dir": "r", "model": ("elsewhere",)}))
    (tmp_path / agents.BASE).mkdir(parents=True)
    (tmp_path / agents.BASE / "config.json").write_text("{}")
    agents.make_base(config)
    assert len(made) == 1


def test_a_mistake_in_a_flag_does_not_wait_for_the_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agents.make_world_base, "make_base", lambda of: pytest.fail("made"))
    for flag in ("--lam=1", "--attack_rank=0", "--stop=x"):
        with pytest.raises(SystemExit, match=flag.split("=")[0].removeprefix("--attack_")):
            small.call(agents.VERB, "--run_dir=r", "--defenses=sft", flag)
