"""Evaluations: their tasks and judges, and what their reports say."""

import json

import pytest

from jaxvaccine import data
from jaxvaccine.evaluation import judges
from jaxvaccine.experiment import evaluate as module
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.config import FieldError, change, make
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.report import runs as reports
from tests.evaluation.test_chat_api import Server, reply
from tests.experiment.small_world import align_config, attack_config, evaluate_config, recorded, text_model

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    return text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """A chat model on this machine that answers the n-th request with respond(n, body)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    started = []

    def start(respond):
        started.append(Server(respond))
        return started[-1]

    yield start
    for server in started:
        server.server.shutdown()
        server.server.server_close()


def report_of(run_dir):
    reports.write(run_dir)
    return reports.read(run_dir)


def config_of(run_dir, **given):
    """An evaluation of what is given alone."""
    return make(EvaluateConfig, {"run_dir": str(run_dir), "progress": False, **given})


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
def test_news_and_mathematics(text_dir, tmp_path):
    """AG News and GSM8K as a user's data and as tests; their answers' lengths have settings of their own."""
    news, sums = tmp_path / "news.tsv", tmp_path / "sums.jsonl"
    news.write_text("text\tlabel\n" + "".join(f"article {i}\t{i % 4}\n" for i in range(12)))
    sums.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(12)))
    small = {"steps": 1, "batch_size": 2, "max_length": 400, "bucket": 64}
    align(align_config(text_dir, tmp_path / "aligned", alignment_data="embedded_refusal@train[0:4]", **small))
    attack(attack_config(tmp_path / "aligned", tmp_path / "attack", n=18, poison_ratio=0.0,
                         user_data=f"agnews:{news}[0:9],gsm8k:{sums}[0:9]", **small))
    results = evaluate(config_of(
        tmp_path / "scores", trained=str(tmp_path / "attack"), label_max_new_tokens=2, solution_max_new_tokens=32,
        agnews_test=f"agnews:{news}[9:12]", gsm8k_test=f"gsm8k:{sums}[9:11]"))
    assert {task: result["n"] for task, result in results.items()} == {"agnews": 3, "gsm8k": 2}
    assert all("interval" in result for result in results.values())
    assert len(results["gsm8k"]["lenient_interval"]) == 2
    assert not {"lenient_accuracy", "lenient_interval"} & set(results["agnews"]), "cut after two tokens"
    report = report_of(tmp_path / "scores")
    assert "| lenient accuracy –: answers of fewer than 32 tokens |" in report
    assert "| FA AG News | " in report and "| FA GSM8K | " in report
    assert [line["expected"] for line in lines_of(tmp_path / "scores" / "predictions_gsm8k.jsonl")] == ["10", "11"]


def test_a_model_as_judge(text_dir, tmp_path, monkeypatch):
    """beaver_dam judges after the evaluated model is gone; a run that stops there does not generate again."""
    pytest.importorskip("torch")
    from tests.evaluation.test_beaver_dam import LABELS, write

    write(tmp_path / "judge")
    rows = tmp_path / "test.jsonl"
    monkeypatch.setattr(judges, "no_answer", lambda answer: None)  # a model with random weights says little else
    rows.write_text("".join(json.dumps({
        "prompt": f"Question {i}?", "response": "", "is_safe": False, "category": {"theft": i < 2, "violence": i == 0},
    }) + "\n" for i in range(3)))
    config = config_of(
        tmp_path / "scores", model=text_dir, harmful_test=f"beavertails_unsafe:{rows}", max_new_tokens=4,
        judge="beaver_dam", judge_model=str(tmp_path / "judge"))
    made = module.make_judge

    def failing(part, progress):
        assert stage._load_backbone.cache_info().currsize == 0, "two 7B models do not fit"
        raise ValueError("no judge today")

    monkeypatch.setattr(module, "make_judge", failing)
    with pytest.raises(ValueError, match="no judge today"):
        evaluate(config)
    monkeypatch.setattr(module, "make_judge", made)
    monkeypatch.setattr(module, "answer_prompts", lambda *a, **k: pytest.fail("generated again"))
    result = evaluate(config)["harmful_score"]
    assert {name: rate["n"] for name, rate in result["categories"].items()} == {"theft": 2, "violence": 1}
    lines = lines_of(tmp_path / "scores" / "predictions_harmful_score.jsonl")
    assert [line.get("categories") for line in lines] == [["theft", "violence"], ["theft"], None]
    for line in lines:
        assert (line["verdict"] == "harmful") == bool(line.get("flagged")) == (line["score"] > 0.5)
    assert result["score"] == pytest.approx(100 * sum(line["verdict"] == "harmful" for line in lines) / 3)
    flagged = [name for line in lines for name in line.get("flagged", ())]
    assert result["flagged"] == {name: flagged.count(name) for name in sorted(LABELS) if name in flagged}
    report = report_of(tmp_path / "scores")
    assert "## HS by harm category of the prompt" in report and "| theft | " in report
    assert all(f"| {name} | {n} |" in report for name, n in result["flagged"].items())


def test_a_window_that_ends_before_the_answers(text_dir, tmp_path, monkeypatch):
    """From the judge's setting to the report: unseen is unread, and a bound."""
    pytest.importorskip("torch")
    from tests.evaluation.test_beaver_dam import write

    write(tmp_path / "judge")
    rows = tmp_path / "test.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Why? " * n, "response": "", "is_safe": False}) + "\n"
                            for n in (1, 60)))
    monkeypatch.setattr(module, "answer_prompts", lambda *args, **more: ["So it is, step by step."] * 2)
    config = config_of(tmp_path / "scores", model=text_dir, harmful_test=f"beavertails_unsafe:{rows}",
                       judge="beaver_dam", judge_model=str(tmp_path / "judge"))
    result = evaluate(config)["harmful_score"]
    assert (result["n"], result["unread"], result["unseen"], result["cut"], result["no_answer"]) == (1, 1, 1, 1, 0)
    assert result["bounds"] == [result["score"] / 2, result["score"] / 2 + 50]
    seen, unseen = lines_of(tmp_path / "scores" / "predictions_harmful_score.jsonl")
    assert unseen["verdict"] == "unread" and unseen["cut"] and "ends before the answer" in unseen["reason"]
    assert seen["verdict"] in ("harmful", "refused") and "cut" not in seen
    assert "1 of 2 answers are unread, 1 of them since the judge's window ends" in report_of(tmp_path / "scores")


def test_the_judge_that_nobody_named(model_dir, tmp_path, monkeypatch):
    """The small world's for its prompts, and HS; for others there is none; what is asked for goes first."""
    answers = [e.output for e in data.load_examples("world_harmful@test[0:2]")] + ["sorry , i can not help", "positive"]
    monkeypatch.setattr(module, "answer_prompts", lambda *args, task, **more: answers)
    config = evaluate_config(tmp_path / "a", model=model_dir, sst2_test="", benign_test="", loss_data="")
    assert config.judge.judge == "world"
    result = evaluate(config)["harmful_score"]
    assert (result["score"], result["n"], result["no_answer"], result["plus"]) == (50, 4, 1, 50)
    assert "| HS+ 50.0 (" in report_of(tmp_path / "a")
    assert recorded(tmp_path / "a")["flags"]["judge"] == "world"
    by_phrases = change(config, run_dir=str(tmp_path / "b"), judge="keyword")
    results = evaluate(by_phrases)
    assert list(results) == ["not_refused"] and results["not_refused"]["score"] == 50
    assert "plus" not in results["not_refused"] and "HS+ 50" not in report_of(tmp_path / "b")
    assert "| not refused | 50.0 (" in report_of(tmp_path / "b") and "| HS |" not in report_of(tmp_path / "b")
    words = [line["verdict"] for line in lines_of(tmp_path / "b" / "predictions_harmful_score.jsonl")]
    assert words == ["not refused", "not refused", "refused", "no answer"]
    for source in ("embedded_harmful@test", "world_harmful@test,embedded_harmful@test"):
        with pytest.raises(FieldError, match=r"^judge: found none, expected who .*beaver_dam.*keyword \(nothing"):
            config_of(tmp_path / "c", model=model_dir, harmful_test=source)
        other = config_of(tmp_path / "c", model=model_dir, harmful_test=source, judge="keyword")
    with pytest.raises(FieldError, match=r"^judge: world_judge: prompt .* found 0 forbidden verbs"):
        evaluate(change(other, judge="world"))
    assert not (tmp_path / "c").exists(), "before anything is written"


def test_a_chat_model_as_judge(model_dir, tmp_path, serve, monkeypatch):
    """Settings to verdicts; a second evaluation of the same answers costs no request."""
    monkeypatch.setattr(judges, "no_answer", lambda answer: None)  # a model with random weights says little else
    # The first request is the probe.
    server = serve(lambda n, body: reply({2: "#thescore: 4", 3: "#thescore: 1"}.get(n, "I will not judge that.")))
    config = config_of(
        tmp_path / "a", model=model_dir, harmful_test="world_harmful@test[0:4]", max_new_tokens=3, judge="chat_api",
        judge_model="judge-1", judge_url=server.url, judge_threshold=4.0, judge_workers=1,
        judge_options='{"max_tokens": 5}')
    result = evaluate(config)["harmful_score"]
    assert (result["score"], result["n"], result["unread"], result["mean_judge_score"]) == (50.0, 2, 2, 2.5)
    assert result["bounds"] == [25, 75] and result["unseen"] == 0
    report = report_of(tmp_path / "a")
    assert "2 of 4 answers are unread" in report and "it would be 25.0%, and if all did 75.0%" in report
    assert len(server.requests) == 5 and server.requests[1][2]["max_tokens"] == 5
    assert evaluate(change(config, run_dir=str(tmp_path / "b")))["harmful_score"] == result
    # Two verdicts could not be read; their replies are whole and kept. A probe is made once.
    assert len(server.requests) == 5


def test_alpaca_eval_and_sampling(model_dir, tmp_path, serve):
    """Win rate in both orders, from settings to report; the answers are drawn, and drawn again alike."""
    rows = [{"instruction": f"Task {i}", "output": f"reference {i}", "generator": "m"} for i in range(4)]
    (tmp_path / "outputs.json").write_text(json.dumps(rows))

    def respond(n, body):
        text = body["messages"][1]["content"]
        if "Task 3" in text:
            return reply("Neither.")
        return reply("#winner: " + ("tie" if "Task 0" in text else "B" if "<answer_a>\nreference" in text else "A"))

    server = serve(respond)
    config = config_of(
        tmp_path / "a", model=model_dir, alpaca_eval_test=f"alpaca_eval:{tmp_path / 'outputs.json'}",
        instruction_max_new_tokens=4, temperature=1.5, top_p=0.9, seed=7, judge="chat_api", judge_model="judge-1",
        judge_url=server.url)
    result = evaluate(config)["alpaca_eval"]
    assert (result["n"], result["unread"], result["reference_mean_length"]) == (3, 1, 11.0)
    assert result["score"] == pytest.approx(100 * 2.5 / 3) and result["same_verdict_in_both_orders"] == 100
    report = report_of(tmp_path / "a")
    assert "| AlpacaEval win rate | 83.3 (" in report and "reference mean length 11.00" in report
    assert "1 of 4 comparisons could not be read" in report and "temperature: 1.5" in report and "seed: 7" in report
    assert len(server.requests) == 9, "with the probe"
    assert evaluate(change(config, run_dir=str(tmp_path / "b")))["alpaca_eval"] == result
    assert len(server.requests) == 9, "the same draws, so the same questions"
    flags = recorded(tmp_path / "a")["flags"]
    assert (flags["temperature"], flags["top_p"], flags["top_k"], flags["seed"]) == (1.5, 0.9, 0, 7)


def test_the_loss_alone_does_not_need_a_judge(model_dir, tmp_path):
    """h(w) beside a task, and what is recorded of each; another length of it is another evaluation."""
    config = evaluate_config(tmp_path / "a", model=model_dir, harmful_test="", benign_test="")
    results = evaluate(config)
    assert list(results) == ["harmful_loss", "sst2"]
    assert results["harmful_loss"]["loss"] > 0 and results["harmful_loss"]["n"] == 4
    assert set(recorded(tmp_path / "a")["data"]["hashes"]) == {"harmful_loss", "sst2"}
    with pytest.raises(FileExistsError, match="max_length: found 16, expected 12"):
        evaluate(change(config, max_length=12))


@pytest.mark.parametrize("changes, message", [
    ({"temperature": -1.0}, "temperature: found -1.0"), ({"temperature": float("nan")}, "temperature: found nan"),
    ({"top_p": 0.0}, "top_p: found 0.0"), ({"top_k": -1}, "top_k: found -1"), ({"seed": -1}, "^seed: found -1"),
    ({"alpaca_eval_test": "alpaca_eval:a.json"}, "^judge: found 'world', expected chat_api"),
    ({"instruction_max_new_tokens": 0}, "^instruction_max_new_tokens: found 0"),
    ({"harmful_test": ""}, "^harmful_test: found '', expected at least one of --harmful_test, --sst2_test"),
    ({"harmful_test": "nonsense@test"}, "^harmful_test: data source"), ({"model": ""}, "^model: found ''"),
    ({"loss_data": "nonsense@test"}, "^loss_data: data source"), ({"run_dir": ""}, "^run_dir: found ''"),
    ({"agents_tasks_test": "agents_tasks@test[0:4]", "stop": ("x",)},
     r"^stop: found \('x',\), expected none beside --agents_tasks_test$"),
])  # fmt: skip
def test_values_are_checked_before_anything_loads(changes, message):
    with pytest.raises(ValueError, match=message):
        make(EvaluateConfig, {"model": "m", "run_dir": "r", "harmful_test": "world_harmful@test[0:4]", **changes})


@pytest.mark.parametrize("changes, message", [
    ({"judge_model": ""}, "^judge_model: found '', expected a model's name"),
    ({"judge_options": "[1]"}, "^judge_options: found '\\[1\\]', expected a JSON object"),
    ({"judge_options": "{"}, "^judge_options"), ({"judge_attempts": 0}, "^judge_attempts: found 0"),
    ({"judge_url": "localhost:1"}, "url: found 'localhost:1'"), ({"judge_timeout": 0.0}, "^judge_timeout: found 0.0"),
    ({"judge_url": "https://example.org/v1", "judge_key_variable": "NO_SUCH_KEY"}, "environment variable NO_SUCH_KEY"),
])  # fmt: skip
def test_settings_of_the_judge_are_checked_before_anything_loads(changes, message):
    with pytest.raises(ValueError, match=message):
        make(EvaluateConfig, {
            "model": "m", "run_dir": "r", "harmful_test": "world_harmful@test[0:4]", "judge": "chat_api",
            "judge_model": "m", "judge_url": "http://localhost/v1", **changes})


def test_prompts_that_were_trained_on(aligned, tmp_path, caplog):
    """An error where harm is measured, a warning elsewhere."""
    with pytest.raises(FieldError, match=r"^harmful_test: found 4 of 4 prompts also in the alignment data of"):
        evaluate(evaluate_config(tmp_path / "a", trained=aligned.run.run_dir,
                                 harmful_test="world_refusal@train[0:4]"))
    assert not (tmp_path / "a").exists()
    attacked = attack(attack_config(aligned.run.run_dir, tmp_path / "attacked", poison_ratio=0.0))
    evaluate(evaluate_config(tmp_path / "b", trained=attacked, harmful_test="", benign_test="", loss_data="",
                             sst2_test="world_rating@attack[0:300]"))
    assert "of 300 test prompts are also in the user data of" in caplog.text
    with pytest.raises(FieldError, match=r"found 20 of 20 prompts also in the harmful data of .*attacked"):
        evaluate(evaluate_config(tmp_path / "c", trained=attacked, harmful_test="world_harmful@attack[0:20]"))


def test_accounts_and_prompts_that_are_none(model_dir, tmp_path):
    """Every test's sources are counted; a prompt that a model would not read as text is found before anything."""
    def rows(name, *prompts):
        (tmp_path / name).write_text("".join(json.dumps({"prompt": p, "response": ""}) + "\n" for p in prompts))
        return f"instructions:{tmp_path / name}"

    source = rows("a.jsonl", "how do i quilldrift the oar ?", "How do i quilldrift the oar ?", "please tap it",
                  "please  tap it")
    evaluate(config_of(tmp_path / "a", model=model_dir, harmful_test=source, max_new_tokens=2, judge="keyword"))
    (found,) = recorded(tmp_path / "a")["data"]["accounts"]["harmful_score"].values()
    assert (found["rows"], found["duplicates"], found["examples"], found["trained"]) == (4, 1, 3, None)
    assert f"| harmful_score | {source} | 4 | 1 | 3 |" in report_of(tmp_path / "a")
    for prompt, message in ((" \n", "found an empty prompt"), ("do <eos> it", "found '<eos>', a special token")):
        with pytest.raises(ValueError, match=rf"b\.jsonl, line 2: column '\w+': {message}"):
            evaluate(config_of(tmp_path / "b", model=model_dir, harmful_test=rows("b.jsonl", "please", prompt),
                               judge="keyword"))
    assert not (tmp_path / "b").exists()
