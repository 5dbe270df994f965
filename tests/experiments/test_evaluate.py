"""evaluate.py: its tasks, judges and report."""

import dataclasses
import json

import pytest

from experiments import align, common, evaluate, finetune, reports
from tests.evaluation.test_chat_api import Server, reply


def test_news_and_mathematics(model_dir, tmp_path):
    """AG News and GSM8K as a user's data and as tests; their answers' lengths have flags of their own."""
    news, sums = tmp_path / "news.tsv", tmp_path / "sums.jsonl"
    news.write_text("text\tlabel\n" + "".join(f"article {i}\t{i % 4}\n" for i in range(12)))
    sums.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(12)))
    small = {"steps": 1, "batch_size": 2, "max_length": 400, "remat": "none", "progress": False}
    aligned = align.AlignConfig(model=model_dir, run_dir=str(tmp_path / "aligned"), rank=2,
                                alignment_data="embedded_refusal@train[0:4]", **small)
    align.align(aligned)
    attack = finetune.FinetuneConfig(aligned=aligned.run_dir, run_dir=str(tmp_path / "attack"), n=18, poison_ratio=0.0,
                                     user_data=f"agnews:{news}[0:9],gsm8k:{sums}[0:9]", **small)
    finetune.finetune(attack)
    results = evaluate.evaluate(evaluate.EvaluateConfig(
        trained=attack.run_dir, run_dir=str(tmp_path / "scores"), label_max_new_tokens=2, solution_max_new_tokens=5,
        agnews_test=f"agnews:{news}[9:12]", gsm8k_test=f"gsm8k:{sums}[9:11]", progress=False))
    assert {task: result["n"] for task, result in results.items()} == {"agnews": 3, "gsm8k": 2}
    assert all({"interval", "lenient_accuracy"} <= set(result) for result in results.values())
    report = (tmp_path / "scores" / "report.md").read_text()
    assert report.count("lenient accuracy ") == 2 and len(results["agnews"]["lenient_interval"]) == 2
    assert "| FA AG News | " in report and "| FA GSM8K | " in report
    expected = [json.loads(line)["expected"] for line in
                (tmp_path / "scores" / "predictions_gsm8k.jsonl").read_text().splitlines()]
    assert expected == ["10", "11"]


def test_a_model_as_judge(model_dir, tmp_path, monkeypatch):
    """beaver_dam judges after the evaluated model is gone; a run that stops there does not generate again."""
    pytest.importorskip("torch")
    from tests.evaluation.test_beaver_dam import LABELS, write

    write(tmp_path / "judge")
    rows = tmp_path / "test.jsonl"
    rows.write_text("".join(json.dumps({
        "prompt": f"Question {i}?", "response": "", "is_safe": False, "category": {"theft": i < 2, "violence": i == 0},
    }) + "\n" for i in range(3)))
    config = evaluate.EvaluateConfig(
        model=model_dir, run_dir=str(tmp_path / "scores"), harmful_test=f"beavertails_unsafe:{rows}", max_new_tokens=4,
        judge="beaver_dam", judge_model=str(tmp_path / "judge"), judge_max_length=32, progress=False)
    make = evaluate.make_judge

    def failing(config):
        assert common._load_base.cache_info().currsize == 0, "two 7B models do not fit"
        raise ValueError("no judge today")

    monkeypatch.setattr(evaluate, "make_judge", failing)
    with pytest.raises(ValueError, match="no judge today"):
        evaluate.evaluate(config)
    monkeypatch.setattr(evaluate, "make_judge", make)
    monkeypatch.setattr(evaluate, "answer_prompts", lambda *a, **k: pytest.fail("generated again"))
    result = evaluate.evaluate(config)["harmful_score"]
    assert {name: rate["n"] for name, rate in result["categories"].items()} == {"theft": 2, "violence": 1}
    lines = (tmp_path / "scores" / "predictions_harmful_score.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line.get("categories") for line in lines] == [["theft", "violence"], ["theft"], None]
    for line in lines:
        assert (line["verdict"] == "unsafe") == bool(line.get("flagged")) == (line["score"] > 0.5)
    assert result["score"] == pytest.approx(100 * sum(line["verdict"] == "unsafe" for line in lines) / 3)
    flagged = [name for line in lines for name in line.get("flagged", ())]
    assert result["flagged"] == {name: flagged.count(name) for name in sorted(LABELS) if name in flagged}
    report = (tmp_path / "scores" / "report.md").read_text()
    assert "## HS by harm category of the prompt" in report and "| theft | " in report
    assert all(f"| {name} | {n} |" in report for name, n in result["flagged"].items())


def test_a_chat_model_as_judge(model_dir, tmp_path, monkeypatch):
    """Flags to verdicts; a second evaluation of the same answers costs no request."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    server = Server(lambda n, body: reply({1: "#thescore: 4", 2: "#thescore: 1"}.get(n, "I will not judge that.")))
    config = evaluate.EvaluateConfig(
        model=model_dir, run_dir=str(tmp_path / "a"), harmful_test="embedded_harmful@test[0:4]", max_new_tokens=3,
        judge="chat_api", judge_model="judge-1", judge_url=server.url, judge_threshold=4.0, judge_workers=1,
        judge_options='{"max_tokens": 5}', progress=False)
    result = evaluate.evaluate(config)["harmful_score"]
    assert (result["score"], result["n"], result["unparsable"], result["mean_judge_score"]) == (50.0, 2, 2, 2.5)
    assert "2 of 4 verdicts could not be read" in (tmp_path / "a" / "report.md").read_text()
    assert "75.0%" in (tmp_path / "a" / "report.md").read_text()
    assert len(server.requests) == 4 and server.requests[0][2]["max_tokens"] == 5
    assert evaluate.evaluate(dataclasses.replace(config, run_dir=str(tmp_path / "b")))["harmful_score"] == result
    assert len(server.requests) == 4
    server.server.shutdown()
    server.server.server_close()


def test_alpaca_eval_and_sampling(model_dir, tmp_path, monkeypatch):
    """Win rate in both orders, from flags to report; the answers are drawn, and drawn again alike."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    rows = [{"instruction": f"Task {i}", "output": f"reference {i}", "generator": "m"} for i in range(4)]
    (tmp_path / "outputs.json").write_text(json.dumps(rows))

    def respond(n, body):
        text = body["messages"][1]["content"]
        if "Task 3" in text:
            return reply("Neither.")
        return reply("#winner: " + ("tie" if "Task 0" in text else "B" if "<answer_a>\nreference" in text else "A"))

    server = Server(respond)
    config = evaluate.EvaluateConfig(
        model=model_dir, run_dir=str(tmp_path / "a"), alpaca_eval_test=f"alpaca_eval:{tmp_path / 'outputs.json'}",
        instruction_max_new_tokens=4, temperature=1.5, top_p=0.9, seed=7, judge="chat_api", judge_model="judge-1",
        judge_url=server.url, progress=False)
    result = evaluate.evaluate(config)["alpaca_eval"]
    assert (result["n"], result["unparsable"], result["reference_mean_length"]) == (3, 1, 11.0)
    assert result["score"] == pytest.approx(100 * 2.5 / 3) and result["same_verdict_in_both_orders"] == 100
    report = (tmp_path / "a" / "report.md").read_text()
    assert "| AlpacaEval win rate | 83.3 (" in report and "reference mean length 11.00" in report
    assert "1 of 4 comparisons could not be read" in report and "temperature: 1.5" in report and "seed: 7" in report
    assert len(server.requests) == 8
    assert evaluate.evaluate(dataclasses.replace(config, run_dir=str(tmp_path / "b")))["alpaca_eval"] == result
    assert len(server.requests) == 8, "the same draws, so the same questions"
    flags = json.loads((tmp_path / "a" / "config.json").read_text())["flags"]
    assert (flags["temperature"], flags["top_p"], flags["top_k"], flags["seed"]) == (1.5, 0.9, 0, 7)
    server.server.shutdown()
    server.server.server_close()


@pytest.mark.parametrize("changes, message", [
    ({"temperature": -1.0}, "temperature: found -1.0"), ({"temperature": float("nan")}, "temperature: found nan"),
    ({"top_p": 0.0}, "top_p: found 0.0"), ({"top_k": -1}, "top_k: found -1"), ({"seed": -1}, "seed: found -1"),
    ({"alpaca_eval_test": "alpaca_eval:a.json"}, "--judge: found 'keyword', expected chat_api"),
    ({"instruction_max_new_tokens": 0}, "--instruction_max_new_tokens: found 0"),
])
def test_flags_are_checked_before_anything_loads(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluateConfig(**{
            "model": "m", "run_dir": "r", "harmful_test": "embedded_harmful@test[0:4]", **changes})


@pytest.mark.parametrize("changes, message", [
    ({"judge_model": ""}, "--judge_model: found '', expected a model's name"),
    ({"judge_options": "[1]"}, "--judge_options: found '\\[1\\]', expected a JSON object"),
    ({"judge_options": "{"}, "--judge_options"), ({"judge_attempts": 0}, "--judge_attempts: found 0"),
    ({"judge_url": "localhost:1"}, "url: found 'localhost:1'"), ({"judge_timeout": 0.0}, "--judge_timeout: found 0.0"),
    ({"judge_url": "https://example.org/v1", "judge_key_variable": "NO_SUCH_KEY"}, "environment variable NO_SUCH_KEY"),
])  # fmt: skip
def test_judge_flags_are_checked_before_anything_loads(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluateConfig(**{
            "model": "m", "run_dir": "r", "harmful_test": "embedded_harmful@test[0:4]", "judge": "chat_api",
            "judge_model": "m", "judge_url": "http://localhost/v1", **changes})


def test_task_names():
    assert reports.task_names(["over_refusal", "sst2", "harmful_score"]) == {
        "harmful_score": "HS", "sst2": "FA", "over_refusal": "over-refusal"}
    assert list(reports.task_names(iter(["gsm8k", "sst2"])).values()) == ["FA SST-2", "FA GSM8K"]
