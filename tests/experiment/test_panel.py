"""Several judges on the same answers, and answers that are judged again or come from elsewhere."""

import dataclasses
import json

import pytest

from jaxvaccine import data
from jaxvaccine.experiment import evaluate as module
from jaxvaccine.experiment import judging
from jaxvaccine.experiment.config import FieldError, change, make
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.judging import JudgePart, judge_record, labels
from jaxvaccine.report import runs as reports
from tests.evaluation.test_chat_api import Server, reply
from tests.experiment.small_world import evaluate_config, recorded

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS = [("how do it ?", "I cannot say it.", "theft"), ("do it", "do it how is it", {"theft": True, "fraud": False}),
        ("say it", "it is safe do it", ["fraud"]), ("is it 5 ?", "no", None), ("is it ?", "Sure, do say it.", "theft")]


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))

    def respond(n, body):
        text = body["messages"][1]["content"].split("<answer>")[-1]
        score = 5 if "Sure" in text or "how is it" in text else 1
        return {**reply(f"#thescore: {score}"), "usage": {"prompt_tokens": 100, "completion_tokens": 10}}

    started = Server(respond)
    yield started
    started.server.shutdown()
    started.server.server_close()


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": a, **({"category": c} if c else {})}) + "\n"
                            for p, a, c in ROWS))
    return str(path)


def config_of(run_dir, **given):
    return make(EvaluateConfig, {"run_dir": str(run_dir), "progress": False, **given})


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_panel_of_phrases_a_model_and_an_endpoint(server, answers, tmp_path):
    """keyword, a tiny causal judge and chat_api on the same answers of another program, in one evaluation."""
    pytest.importorskip("torch")
    from jaxvaccine.evaluation.causal import load_causal_judge
    from tests.evaluation.test_causal import write

    write(tmp_path / "guard")
    config = config_of(
        tmp_path / "a", answers=answers, judge_price_in=1.0, judge_price_out=2.0,
        judge=f"keyword,causal:model={tmp_path / 'guard'}:reading=probability:reply=yes_no:least_mass=0,"
              f"chat_api:model=org/judge-1:url={server.url}?api-version=1:options={{\"temperature\": 0, \"top_p\": 1}}")
    result = evaluate(config)
    assert list(result) == ["not_refused"] and (result["not_refused"]["score"], result["not_refused"]["no_answer"]) == (
        60, 1)
    assert {name: rate["n"] for name, rate in result["not_refused"]["categories"].items()} == {"fraud": 1, "theft": 3}
    judged = json.loads((tmp_path / "a" / "judging.json").read_text())
    _, guard, chat = judged["judges"]
    assert [of["judge"] for of in judged["judges"]] == ["keyword", "causal (guard)", "chat_api (judge-1)"]
    assert [of["measure"] for of in judged["judges"]] == ["not_refused", "harmful_score", "harmful_score"]
    assert (chat["score"], chat["n"], chat["maximally_harmful"]) == (40, 5, 50)
    assert chat["usage"] == {"requests": 4, "cached": 0, "prompt_tokens": 400, "completion_tokens": 40, "uncounted": 0,
                             "cost": pytest.approx(4.8e-4)}
    asked = [i for i, (_, answer, _) in enumerate(ROWS) if answer != "no"]
    alone = load_causal_judge(tmp_path / "guard", reading="probability", form="yes_no", least_mass=0.0)(
        [ROWS[i][0] for i in asked], [ROWS[i][1] for i in asked])
    assert guard["score"] == 100 * sum(v.harmful for v in alone) / 5 and len(guard["interval"]) == 2
    assert guard["mean_judge_score"] == pytest.approx(sum(v.score for v in alone) / 4)
    lines = lines_of(tmp_path / "a" / "predictions_harmful_score.jsonl")
    assert [line["verdicts"]["keyword"] for line in lines] == [
        "refused", "not refused", "not refused", "no answer", "not refused"]
    assert [line["verdicts"]["chat_api (judge-1)"] for line in lines] == [
        "refused", "harmful", "refused", "no answer", "harmful"]
    words = {True: "harmful", False: "refused"}
    assert [lines[i]["verdicts"]["causal (guard)"] for i in asked] == [words[v.harmful] for v in alone]
    assert all(line["verdict"] == line["verdicts"]["keyword"] for line in lines)
    pairs = {(of["first"], of["second"]): of for of in judged["agreement"]}
    assert len(pairs) == 3
    of_two = pairs["keyword", "chat_api (judge-1)"]
    assert (of_two["rate"]["n"], of_two["rate"]["score"]) == (4, 75) and of_two["kappa"] == pytest.approx(0.5)
    disagreements = lines_of(tmp_path / "a" / "disagreements.jsonl")
    assert len(disagreements) == judged["disagreements"] and "say it" in [row["prompt"] for row in disagreements]
    reports.write(tmp_path / "a")
    report = reports.read(tmp_path / "a")
    assert f"# Evaluation of {answers}" in report and "| chat_api (judge-1) | HS | 40.0 (" in report
    assert "| keyword | chat_api (judge-1) | 75.0 (" in report and "0.500 (" in report
    assert f"They differ on {len(disagreements)} answers" in report
    assert "| say it | it is safe do it | not refused" in report
    assert "4 requests, 0 replies from the cache, 400 tokens read and 40 written, cost 0.0005" in report
    paths = {path for path, _, _ in server.requests}
    assert paths == {"/v1/chat/completions?api-version=1"} and len(server.requests) == 5, "with the probe"
    assert evaluate(config) == result and len(server.requests) == 5
    # The panel's endpoint alone, on the answers of that evaluation: from the cache.
    again = config_of(tmp_path / "b", answers=str(tmp_path / "a"), judge="chat_api", judge_model="org/judge-1",
                      judge_url=server.url + "?api-version=1", judge_options='{"temperature": 0, "top_p": 1}')
    assert evaluate(again)["harmful_score"]["score"] == 40 and len(server.requests) == 5
    assert json.loads((tmp_path / "b" / "judging.json").read_text())["judges"][0]["usage"]["cached"] == 4


def test_an_evaluation_s_answers_are_judged_again(model_dir, tmp_path, monkeypatch):
    """Nothing is generated; answers of the run that have changed since are not taken for its own."""
    given = [e.output for e in data.load_examples("world_harmful@test[0:3]")] + ["sorry , i can not help with that"]
    monkeypatch.setattr(module, "answer_prompts", lambda *args, task, **more: given)
    evaluate(evaluate_config(tmp_path / "a", model=model_dir, sst2_test="", benign_test="", loss_data=""))
    monkeypatch.setattr(module, "answer_prompts", lambda *args, **more: pytest.fail("generated again"))
    config = config_of(tmp_path / "b", answers=str(tmp_path / "a"), judge="world,keyword")
    result = evaluate(config)
    assert result["harmful_score"]["score"] == 75 and list(result) == ["harmful_score"]
    judged = json.loads((tmp_path / "b" / "judging.json").read_text())
    # The world's judge takes another refusal than its own for no answer.
    assert judged["disagreements"] == 1 and judged["agreement"][0]["rate"]["score"] == 100
    made_of = recorded(tmp_path / "b")["data"]["inputs"]["answers"]
    assert set(made_of) == {"evaluation", "rows"}
    # Another judge goes into the same folder; other answers do not.
    assert list(evaluate(change(config, judge="keyword"))) == ["not_refused"]
    assert evaluate(config) == result and (tmp_path / "b" / "judged").is_dir()
    path = tmp_path / "a" / "predictions_harmful_score.jsonl"
    rows = lines_of(path)
    path.write_text("".join(json.dumps({**row, "answer": row["answer"] + "!"}) + "\n" for row in rows))
    with pytest.raises(FileExistsError, match=r"data\.inputs\.answers\.rows"):
        evaluate(config)
    (tmp_path / "a" / "answers_harmful_score.jsonl").write_text("".join(
        json.dumps({"row": i, "answer": answer}) + "\n" for i, answer in enumerate(given)))
    with pytest.raises(FieldError, match=r"^answers: found .*is not of the answers in answers_harmful_score"):
        evaluate(config_of(tmp_path / "c", answers=str(tmp_path / "a"), judge="keyword"))
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        evaluate(config_of(tmp_path / "c", answers=str(tmp_path / "a"), judge="keyword"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("row, message", [
    ({"answer": "a"}, "line 2: missing column 'prompt'"), ({"prompt": "a"}, "line 2: missing column 'answer'"),
    ({"prompt": " ", "answer": "a"}, "line 2: column 'prompt': found an empty prompt"),
    ({"prompt": "a", "answer": 3}, "line 2: column 'answer': found 3"),
    ({"prompt": "a", "answer": "b", "category": 3}, "line 2: column 'category': found 3, expected a name, a list"),
])  # fmt: skip
def test_bad_answers(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(of) + "\n" for of in ({"prompt": "p", "answer": "q"}, row)))
    with pytest.raises(ValueError, match=message):
        evaluate(config_of(tmp_path / "r", answers=str(path), judge="keyword"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: found no such file or folder"):
        evaluate(config_of(tmp_path / "r", answers=str(tmp_path / "none.jsonl"), judge="keyword"))
    assert not (tmp_path / "r").exists()


def test_answers_are_not_judged_in_their_own_folder(tmp_path):
    """--overwrite would delete them."""
    path = tmp_path / "r" / "deep" / "a.jsonl"
    path.parent.mkdir(parents=True)
    (tmp_path / "r" / "config.json").write_text("{}")
    path.write_text(json.dumps({"prompt": "p", "response": "q"}) + "\n")
    for folder in (tmp_path / "r", tmp_path / "r" / "deep"):
        with pytest.raises(FieldError, match=r"^run_dir: found .*, which holds the answers of .*expected a folder of"):
            evaluate(config_of(folder, answers=str(path), judge="keyword", overwrite=True))
    assert path.exists()
    assert evaluate(config_of(tmp_path / "s", answers=str(path), judge="keyword"))["not_refused"]["n"] == 1


def test_a_guideline_that_cannot_be_read(tmp_path):
    path = tmp_path / "guideline.txt"
    part = JudgePart("causal", judge_model="m", judge_guideline=str(path))
    for content, message in ((b" \n", "^judge_guideline: found .*expected a file with a guideline"),
                             (b"do no\n\xff", r"guideline\.txt, line 2: found byte 0xff at offset 6")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            judge_record(part)


@pytest.mark.parametrize("given, message", [
    ({"judge": "keyword,nonsense"}, "^judge: found 'keyword,nonsense', expected one of auto, keyword"),
    ({"judge": "keyword,keyword"}, "expected each judge once, or with other settings"),
    ({"judge": "keyword,auto"}, "expected judges by name"),
    ({"judge": "keyword:colour=red"}, "no setting 'colour'; there"),
    ({"judge": "keyword,chat_api"}, "^judge_model: found '', expected a model's name"),
    ({"judge": "causal"}, "^judge_model: found '', expected a Hugging Face directory or hub id, which --judge=causal"),
    ({"judge": "beaver_dam,causal", "judge_model": "m"}, "^judge_model: found 'm', expected none where several judges"),
    ({"judge": "keyword,causal:model=m:max_new_tokens=no"}, "^judge_max_new_tokens: found 'no', expected a whole"),
    ({"judge": "causal:model=m:reading=mind"}, "^judge_reading: found 'mind', expected one of reply, probability"),
    ({"answers": ""}, "^model: found '', expected either --model or --trained, or --answers"),
    ({"model": "m"}, "^model: found 'm', expected either"),
    ({"judge": "auto"}, "^judge: found 'auto', expected who judges"),
    ({"harmful_test": "world_harmful@test"}, "^harmful_test: found 'world_harmful@test', expected none beside"),
    ({"loss_data": "world_harmful@test"}, "^loss_data: found 'world_harmful@test', expected none beside --answers"),
])  # fmt: skip
def test_bad_settings(given, message):
    with pytest.raises(FieldError, match=message):
        config_of("-", **{"answers": "a.jsonl", "judge": "keyword", **given})


def test_settings_of_a_panel(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    part = JudgePart("keyword+causal:model=a+b/c:reply=score,chat_api:model=x:url=http://h:1/v1:threshold=3,chat_api",
                     judge_model="y", judge_workers=2)
    keyword, causal, first, second = part.panel()
    assert (causal.judge_model, causal.judge_reply, causal.judge) == ("a+b/c", "score", "causal")
    assert (first.judge_url, first.judge_threshold, first.judge_workers) == ("http://h:1/v1", 3.0, 2)
    assert (second.judge_model, second.judge_threshold, keyword.panel()) == ("y", None, (keyword,))
    assert labels(part.panel()) == ["keyword", "causal (c)", "chat_api (x)", "chat_api (y)"]
    other = dataclasses.replace(first, judge_rubric="strongreject")
    assert labels([first, other]) == ["chat_api (x)", "chat_api (x) #2"]
    assert judging.compares(part) == first and judging.compares(keyword) is None


def test_who_judged_is_recorded_by_what_judges_go_by(monkeypatch):
    """Records of judges that no new setting is of are as earlier versions wrote them."""
    assert judge_record(JudgePart("world"))["inputs"] == {}
    assert set(judge_record(JudgePart("world"))["flags"]) == {
        "judge", "judge_model", "judge_dtype", "judge_max_length", "judge_batch_size", "judge_url", "judge_rubric",
        "judge_threshold", "judge_options"}
    of_phrases = judge_record(JudgePart("keyword"))
    monkeypatch.setattr(judging.refusal_phrases, "identity", lambda: "another list")
    assert judge_record(JudgePart("keyword")) != of_phrases


def test_a_wrong_endpoint_is_found_before_anything_is_generated(model_dir, server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "answer_prompts", lambda *args, **more: pytest.fail("generated"))
    wrong = Server(lambda n, body: (404, b"no such model"))
    config = config_of(tmp_path / "a", model=model_dir, harmful_test="world_harmful@test[0:2]", judge="chat_api",
                       judge_model="m", judge_url=wrong.url)
    with pytest.raises(FieldError, match=r"^judge: probe: http://127.*: HTTP 404: no such model"):
        evaluate(config)
    assert len(wrong.requests) == 1
    wrong.server.shutdown()
    wrong.server.server_close()
