"""What a plan's report says of the attacks that its rows faced, and of data that are fewer than a paper's."""

import json

import pytest

from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.runs import CONFIG
from jaxvaccine.report import plan, recipe
from tests.report.synthetic import plan_table, rows_of

P = "poison_ratio=0.1"
ATTACK = {"adapter": "new", "rank": 8, "lora_alpha": 1.0, "targets": ["q_proj", "v_proj"], "dropout": 0.1,
          "only_layers": None, "steps": 0, "epochs": 20.0, "batch_size": 10, "learning_rate": 1e-5,
          "schedule": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.1, "clip_norm": 1.0, "max_length": 200,
          "n": 1000}  # of a folder from before there was --optimizer


def faced(method, attack=P, **changes):
    return {"method": method, "attack": attack, "faced": {**ATTACK, **changes}}


def write(folder, **operational):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"operational": operational}))


@pytest.mark.parametrize("changes, ours, theirs", [
    ({"batch_size": 5}, "batches of 10", "batches of 5"),
    ({"adapter": "continue", "rank": 32}, "new adapter, rank 8, alpha 1, on q, v",
     "aligned adapter, rank 32, alpha 1, on q, v"),
    ({"learning_rate": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
     "rate 1e-05 cosine, 10% warm-up", "rate 0.001 constant"),
    ({"steps": 40, "epochs": None}, "20 epochs", "40 steps"), ({"max_length": 100}, "length 200", "length 100"),
    ({"epochs": 50.0, "n": 700}, "20 epochs; n = 1000", "50 epochs; n = 700"),
    ({"dropout": 0.0}, "dropout = 0.1", "dropout = 0"), ({"clip_norm": 0.0}, "clip norm = 1", "clip norm = 0"),
    ({"optimizer": "muon"}, "AdamW", "Muon"), ({"weight_decay": 0.0}, "weight decay = 0.1", "weight decay = 0"),
    ({"only_layers": ["0", "2"]}, "all layers", "layers 0, 2 alone"),
    ({"only_layers": ["rarest:2"]}, "all layers", "the 2 layers least active in alignment alone"),
    ({"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
     "new adapter, rank 8, alpha 1, on q, v", "new adapter, rank 8, alpha 1, on all projections"),
])  # fmt: skip
def test_what_differs_is_said_of_all(changes, ours, theirs):
    found = recipe.texts([faced("t_vaccine"), faced("sft", **changes)])
    assert found == {("t_vaccine", P): ours, ("sft", P): theirs}


def test_attacks_that_a_text_tells_apart_are_not_said_to_differ():
    assert recipe.texts([faced("sft"), faced("booster"), faced("sft", "n=5", n=5), faced("booster", "n=5", n=5)]) == {}
    assert recipe.texts([]) == {}


def test_the_column(tmp_path):
    write(tmp_path, faced=[faced("sft", batch_size=5), faced("booster")])
    table = plan_table(attacks=(P,), seeds=(0,))
    text = plan.plan_report(table, tmp_path, "T", faced=recipe.faced(tmp_path))
    header, *rows = rows_of(text)
    assert header[:3] == ["method", "model", "attack it faced"] and recipe.NOTE in text
    assert {tuple(row[:2]): row[2] for row in rows} == {
        ("as it comes", "backbone"): "–", ("SFT", "aligned"): "–", ("SFT", "attacked, p = 0.1"): "batches of 5",
        ("Booster", "aligned"): "–", ("Booster", "attacked, p = 0.1"): "batches of 10"}
    assert rows_of(recipe.section(tmp_path), "## Attacks") == [
        ["method", "attack", "attack it faced"], ["SFT", "p = 0.1", "batches of 5"],
        ["Booster", "p = 0.1", "batches of 10"]]
    write(tmp_path, faced=[faced("sft"), faced("booster")])
    assert recipe.section(tmp_path) == "" and recipe.faced(tmp_path) == {}
    plain = plan.plan_report(table, tmp_path, "T", faced={})
    assert "attack it faced" not in plain and recipe.NOTE not in plain
    assert recipe.section(tmp_path / "nothing") == ""


def test_fewer_data_than_the_papers(tmp_path):
    cells = {"plan": {"backbones": ["m"], "seeds": [0], "pairs": [["booster", P], ["sft+lisa", P], ["sft", P]]}}
    write(tmp_path, paper="booster", of_paper={"booster": "booster", "sft+lisa": "lisa", "sft": "sft"}, **cells)
    records = {("booster", ""): {"alignment": [3000, 2000], "harmful": [20]}, ("sft+lisa", ""): {"alignment": [5000]},
               ("sft+lisa", P): {"alignment": [5000], "harmful": [5]}}
    for (method, attack), counts in records.items():
        path = result_path(tmp_path, Cell("m", method, attack, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"accounts": {
            name: {f"source {i}": {"examples": count} for i, count in enumerate(of)} for name, of in counts.items()}}))
    assert recipe.fewer_data(tmp_path).splitlines() == [
        "Less than the paper has:", "", "- Fewer data than in booster/booster: 20 harmful rows, the paper's 5000.",
        "- Fewer data than in booster/lisa: 5000 guide rows, the paper's 10000."]
    write(tmp_path, paper="", of_paper={}, **cells)
    assert recipe.fewer_data(tmp_path) == recipe.fewer_data(tmp_path / "nothing") == ""
