"""Two judges on the same answers: what is written, and what is said to bad input."""

import json

import pytest

from jaxvaccine.experiment.compare_judges import ComparedJudge, ComparisonPart, compare, name_of
from jaxvaccine.experiment.config import FieldError, make
from jaxvaccine.experiment.judging import JudgePart
from jaxvaccine.report import runs as reports
from tests.evaluation.test_chat_api import Server, reply

ROWS = [("a", "I cannot do that.", "refused"), ("b", "Sure, so.", "harmful"), ("c", "Sure, 👋 you", "refused"),
        ("d", "I'm sorry.", "harmful"), ("e", "Sure, so.\n", "unread"), ("f", "No, I cannot.", "refused")]


@pytest.fixture
def predictions(tmp_path):
    def write(rows, name="predictions_harmful_score.jsonl"):
        fields = ("prompt", "answer", "verdict")
        path = tmp_path / name
        path.write_text("".join(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows))
        return str(path)

    return write


def configs(tmp_path, *files, **second):
    return (make(ComparisonPart, {"run_dir": str(tmp_path / "run"), "predictions": files, "progress": False}),
            ComparedJudge(), make(ComparedJudge, {"judge": "keyword", **second}))


def test_recorded_verdicts_against_another_judge(predictions, tmp_path):
    files = predictions(ROWS[:4], "a.jsonl"), predictions(ROWS[4:], "b.jsonl")
    found = compare(*configs(tmp_path, *files))
    assert found == json.loads((tmp_path / "run" / "agreement.json").read_text())
    # keyword: refused, not refused, not refused, refused, not refused, refused
    assert found["table"] == [[0, 1, 1, 0, 0], [0] * 5, [0, 1, 2, 0, 0], [0] * 5, [0, 1, 0, 0, 0]]
    assert found["rate"]["n"] == 5 and found["rate"]["score"] == 60
    assert found["kappa"] == pytest.approx((0.6 - (0.4 * 0.4 + 0.6 * 0.6)) / (1 - (0.4 * 0.4 + 0.6 * 0.6)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "disagreements.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["first"], line["second"]) for line in lines] == [
        ("b", "harmful", "not refused"), ("c", "refused", "not refused"), ("d", "harmful", "refused"),
        ("e", "unread", "not refused")]
    report = reports.write_agreement(tmp_path / "run", "recorded", "keyword")
    assert report.startswith("# recorded and keyword on 6 answers")
    assert "| recorded: harmful | 1 | 1 |" in report and "60.0%" in report
    assert report == (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert compare(*configs(tmp_path, *files)) == found


def test_a_chat_model(predictions, tmp_path, monkeypatch):
    """Its settings reach it; asked once, although the comparison is carried out a second time in another folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(lambda n, body: reply("#thescore: 5" if "Sure" in body["messages"][-1]["content"] else
                                          "#thescore: 1"))
    judge = {"judge": "chat_api", "judge_model": "org/judge-1", "judge_url": server.url,
             "judge_cache": str(tmp_path / "cache")}
    run, first, second = configs(tmp_path, predictions(ROWS), **judge)
    found = compare(run, first, second)
    # The model: refused, harmful, harmful, refused, harmful, refused, as keyword.
    assert found["table"] == [[1, 0, 1, 0, 0], [0] * 5, [1, 0, 2, 0, 0], [0] * 5, [1, 0, 0, 0, 0]]
    assert len(server.requests) == 6
    assert server.requests[0][2]["model"] == "org/judge-1"
    again = make(ComparisonPart, {"run_dir": str(tmp_path / "again"), "predictions": run.predictions})
    assert compare(again, make(ComparedJudge, {"judge": "keyword"}), second)["kappa"] == 1
    assert len(server.requests) == 6
    flags = json.loads((tmp_path / "again" / "config.json").read_text())
    assert flags["flags"]["second_judge_model"] == "org/judge-1" and flags["flags"]["first_judge"] == "keyword"
    assert flags["operational"]["second_judge_cache"] == judge["judge_cache"]
    assert (name_of(second), name_of(first)) == ("chat_api (judge-1)", "recorded")
    server.server.shutdown()
    server.server.server_close()


def test_bad_input(predictions, tmp_path):
    sst2 = predictions([("a", "positive", "correct")])
    with pytest.raises(ValueError, match=r"line 1: column 'verdict': found 'correct', expected one of harmful"):
        compare(*configs(tmp_path, sst2))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: found no such file"):
        compare(*configs(tmp_path, str(tmp_path / "none.jsonl")))
    with pytest.raises(FieldError, match=r"^predictions: found \(\), expected at least one file"):
        ComparisonPart(run_dir="r")
    with pytest.raises(FieldError, match=r"^judge: found 'recorded', expected one of auto, keyword"):
        JudgePart(judge="recorded")
    run, first, second = configs(tmp_path, predictions(ROWS))
    with pytest.raises(FieldError, match=r"^second_judge: found 'recorded', expected another than the first"):
        compare(run, first, first)
    assert not (tmp_path / "run").exists()
    compare(run, first, second)
    with pytest.raises(FileExistsError, match='second_judge: found "keyword", expected "recorded"'):
        compare(run, second, first)
    with pytest.raises(FileExistsError, match=r"data\.hashes\."):
        predictions(ROWS[:3])
        compare(run, first, second)
