"""The reports of single runs: training, evaluation, two judges, two implementations."""

import json

import numpy as np
import pytest

from jaxvaccine.data import Account
from jaxvaccine.evaluation.agreement import agreement
from jaxvaccine.report.agreement import agreement_report
from jaxvaccine.report.divergence import HEADINGS, YARDSTICK, write_comparison_report
from jaxvaccine.report.evaluation import write_evaluation_report
from jaxvaccine.report.runs import write
from jaxvaccine.report.style import METHODS
from jaxvaccine.report.training import write_training_report
from tests.report.synthetic import labelled, rows_of

COUNTS = Account("", 9, examples=6, trained=6)._asdict() | {"unread": [], "bad": {}}


@pytest.mark.parametrize("lost, said", [
    ((3,), "lacks 1 of 10 steps (counted from 0): 3."),
    ((0, 6, 7, 8, 9), "lacks 5 of 10 steps (counted from 0): 0, 6 to 9."),
    (range(10), "is missing or has no whole line: nothing is known of the run's 10 steps.")])
def test_training_whose_metrics_have_gaps(run_dir, figures, lost, said):
    write_metrics(run_dir, 10)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    # Damaged in two ways: cut, and away.
    kept = [(line[:9] if i % 2 else "") if i in lost else line for i, line in enumerate(lines)]
    (run_dir / "metrics.jsonl").write_text("\n".join(kept))
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**config, "steps": 10}))
    write_training_report(run_dir, "Booster")
    assert said in (run_dir / "report.md").read_text()


def test_training_without_metrics(run_dir):
    write_training_report(run_dir, "Booster")
    text = (run_dir / "report.md").read_text()
    assert text.startswith("# Booster\n\nmetrics.jsonl is missing") and "- lam: 0.2" in text


@pytest.fixture
def run_dir(tmp_path):
    accounts = {"alignment": {"a.jsonl": {**COUNTS, "duplicates": 3, "disagreeing": 1, "cut": 2, "unread": ["idx"]},
                              "b|.jsonl": COUNTS}, "harmful_score": {"c.jsonl": {**COUNTS, "trained": None}}}
    config = {"flags": {"lam": 0.2, "defense": "booster"}, "data": {"accounts": accounts}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


ACCOUNTS = [
    ["data", "source", "rows", "duplicates", "of them with another answer", "examples", "answer cut", "trained on",
     "columns not read"],
    ["alignment", "a.jsonl", "9", "3", "1", "6", "2", "6", "idx"],
    ["alignment", r"b\|.jsonl", "9", "0", "0", "6", "0", "6", "–"],
    ["harmful_score", "c.jsonl", "9", "0", "0", "6", "0", "–", "–"]]


def write_metrics(folder, count, **more):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": i, "tokens": 1000, "loss": 2.0 - i / count, "gradient_norm": 10.0 ** -i, **more}) + "\n"
        for i in range(count)))


def test_training(run_dir, figures):
    write_metrics(run_dir, 10, harmful_loss=1.0)
    write_training_report(run_dir, "Booster")
    text = (run_dir / "report.md").read_text()
    assert text.startswith("# Booster\n\n10 steps, 10,000 tokens read.\n")
    assert rows_of(text) == [["", "first step", "mean of the last 1"], ["loss", "2", "1.1"], ["harmful loss", "1", "1"],
                             ["gradient norm", "1", "1e-09"]]
    assert rows_of(text, "## Data") == ACCOUNTS and "p = " not in text
    assert "## Flags\n\n- lam: 0.2\n- defense: \"booster\"\n" in text
    axes = figures["metrics.png"].axes
    assert [axis.get_ylabel() for axis in axes] == ["loss (nats per token)", "harmful loss (nats per token)",
                                                    "gradient norm"]
    assert [axis.get_yscale() for axis in axes] == ["linear", "linear", "log"]
    assert axes[0].get_xlabel() == "step" and labelled(axes[0])["every step"].get_ydata()[0] == 2


def test_an_attack_says_what_it_trained_on(run_dir):
    write_metrics(run_dir, 10)
    config = json.loads((run_dir / "config.json").read_text())
    config["data"] |= {"poison_ratio": 0.06, "n": 50}
    config |= {"script": "finetune", "flags": {"aligned": "runs/sft", "poison_ratio": 0.05}}
    (run_dir / "config.json").write_text(json.dumps(config))
    write(run_dir)
    text = (run_dir / "report.md").read_text()
    assert text.startswith("# Fine-tuning of runs/sft with p = 0.06\n")
    assert "Trained on 50 examples, 3 of them harmful: p = 0.06." in text


def test_a_long_training_has_a_running_mean(run_dir, figures):
    write_metrics(run_dir, 100)
    write_training_report(run_dir, "SFT")
    mean = labelled(figures["metrics.png"].axes[0])["mean of 5 steps"]
    # Of a straight line it is the line itself, where it is known.
    np.testing.assert_allclose(mean.get_ydata(), 2 - mean.get_xdata() / 100)
    assert mean.get_xdata().tolist() == list(range(2, 98))


def test_evaluation(run_dir):
    def result(score, **more):
        return {"score": score, "interval": [score - 5, score + 5], "n": 40, "empty": 1, **more}

    write_evaluation_report(run_dir, "runs/sft", {
        "harmful_loss": {"loss": 1.23456, "n": 7},
        "harmful_score": result(50.0, unread=10, unseen=4, cut=6, bounds=[40.0, 60.0], no_answer=8,
                                mean_judge_score=2.5, flagged={"theft": 3},
                                categories={"violence": {"score": 10.0, "interval": [5, 20], "n": 9}}),
        "gsm8k": result(70.0, lenient_accuracy=80.0, lenient_interval=[75, 90]),
        "sst2": result(60.0), "over_refusal": result(5.0, no_answer=2),
        "alpaca_eval": result(20.0, unread=1, mean_length=11.0)})
    text = (run_dir / "report.md").read_text()
    assert rows_of(text) == [
        ["task", "% (95% interval)", "prompts", "no answer", "unread", "empty answers", "also"],
        ["HS", "50.0 (45–55)", "40", "8 (20.0%)", "10 (40.0–60.0%)", "1", "mean judge score 2.50"],
        ["FA GSM8K", "70.0 (65–75)", "40", "–", "0", "1", "lenient accuracy 80.0 (75–90)"],
        ["FA SST-2", "60.0 (55–65)", "40", "–", "0", "1", "lenient accuracy –: answers of fewer than 32 tokens"],
        ["over-refusal", "5.0 (0–10)", "40", "2 (5.0%)", "0", "1", ""],
        ["AlpacaEval win rate", "20.0 (15–25)", "40", "–", "1", "1", "mean length 11.00"]]
    assert "Loss h(w) on 7 harmful examples: 1.2346 nats a token." in text
    assert "10 of 50 answers are unread, 4 of them since the judge's window ends before the answer; HS leaves" in text
    assert "it would be 40.0%, and if all did 60.0%" in text and "6 of 50 conversations are longer than" in text
    assert rows_of(text, "## HS by harm category")[1] == ["violence", "10.0 (5–20)", "9"]
    assert rows_of(text, "## What the judge flags")[1] == ["theft", "3"]
    assert rows_of(text, "## Data") == ACCOUNTS
    assert "1 of 41 comparisons could not be read" in text and "- lam: 0.2" in text


def test_an_evaluation_by_phrases_has_no_hs(run_dir):
    write_evaluation_report(run_dir, "runs/sft", {"not_refused": {
        "score": 10.0, "interval": [5.0, 15.0], "n": 40, "empty": 1, "no_answer": 32, "unread": 0,
        "categories": {"violence": {"score": 10.0, "interval": [5, 20], "n": 9}}}})
    text = (run_dir / "report.md").read_text()
    assert rows_of(text)[1] == ["not refused", "10.0 (5–15)", "40", "32 (80.0%)", "0", "1", ""]
    assert "## Not refused by harm category of the prompt" in text and "| HS |" not in text and "## HS" not in text


def test_two_judges():
    first = ["not refused", "not refused", "refused", "refused", "no answer"]
    text = agreement_report(agreement(first, ["harmful", *["refused"] * 3, "no answer"]), "keyword", "a model",
                            "differ.jsonl")
    assert text.startswith("# keyword and a model on 5 answers\n") and "differ.jsonl" in text
    assert rows_of(text) == [
        ["", "a model: harmful", "a model: refused", "a model: no answer"], ["keyword: not refused", "1", "1", "0"],
        ["keyword: refused", "0", "2", "0"], ["keyword: no answer", "0", "0", "1"]]
    assert "Of 4 answers that both judged they agree on 75.0%" in text and "Cohen's kappa 0.500 (" in text
    text = agreement_report(agreement(["refused"] * 3, ["refused"] * 3), "a", "b", "c")
    assert "kappa is not defined" in text
    text = agreement_report(agreement(["no answer"] * 3, ["no answer"] * 3), "a", "b", "c")
    assert "No answer was judged by both" in text and rows_of(text) == [["", "b: no answer"], ["a: no answer", "3"]]


def steps(scale, count=3):
    return [{"step": i, **dict.fromkeys(HEADINGS, scale * i), "cosine": 1 - scale, "loss_jax": 1.0, "loss_pytorch": 1.5,
             "seconds_jax": 5.0 if i == 0 else 0.1, "seconds_pytorch": 0.2, "active_layers": [1, 3]}
            for i in range(count)]


def test_two_implementations(tmp_path, figures):
    results = {name: {"steps": steps(scale), "peak_memory_jax": 1e9, "peak_memory_pytorch": 2e9}
               for name, scale in (("sft", 1e-6), ("vaccine_booster", 1e-5))}
    methods = {"sft": {"defense": "sft"}, "vaccine_booster": {"defense": "booster", "base_defense": "vaccine"}}
    write_comparison_report(tmp_path, "JAX against PyTorch", results, methods)
    text = (tmp_path / "report.md").read_text()
    rows = rows_of(text)
    assert rows[1] == ["SFT", "2.0e-06", "2.0e-06", "1.0e-06", "2.0e-06", "2.0e-06", "2.0e-06", "0.1", "0.2", "1000",
                       "2000"]
    assert rows_of(text, "## Booster on Vaccine")[1] == ["0", "1.000000", "1.500000", "0.0e+00", "1.0e-05", "0.0e+00",
                                                         "1 3"]
    assert "Dotted" not in text
    axis = figures["divergence.png"].axes[0]
    assert axis.get_yscale() == "log" and list(labelled(axis)) == ["SFT", "Booster on Vaccine"]
    # A logarithm has no place for the 0 of the first step.
    assert labelled(axis)["SFT"].get_xydata().tolist() == [[1, 1e-6], [2, 2e-6]]
    assert labelled(axis)["SFT"].get_color() == METHODS["sft"].color
    results["sft"]["yardsticks"] = {YARDSTICK: steps(1e-2)}
    write_comparison_report(tmp_path, "T", results, methods)
    assert "Dotted" in (tmp_path / "report.md").read_text()
    assert len(figures["divergence.png"].axes[0].lines) == 3
