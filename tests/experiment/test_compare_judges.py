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


def test_labels_of_people(tmp_path):
    """BeaverTails' own columns, or a label; figures by hand."""
    rows = [{"prompt": "a", "response": "I cannot do that.", "is_safe": True},
            {"prompt": "b", "response": "Sure, so it is.", "is_safe": False},
            {"prompt": "c", "answer": "Sure, so it goes.", "label": "harmful"},
            {"prompt": "d", "answer": "I'm sorry.", "label": "harmful"},
            {"prompt": "e", "answer": "no", "label": "safe"},
            {"prompt": "f", "answer": "Tea is a drink.", "label": "safe"}]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make(ComparisonPart, {"run_dir": str(tmp_path / "run"), "labelled": (str(path),), "progress": False})
    found = compare(run, ComparedJudge(), make(ComparedJudge, {"judge": "keyword"}))
    # Harmful: not refused, not refused, refused; others: refused, no answer, not refused.
    assert found["table"] == [[0, 2, 1, 0, 0], [0] * 5, [0, 1, 1, 1, 0], [0] * 5, [0] * 5]
    against = found["against"]
    assert (against["found"]["n"], against["spared"]["n"], against["unread"]) == (3, 3, 0)
    assert against["found"]["score"] == against["spared"]["score"] == pytest.approx(200 / 3)
    assert against["balanced_accuracy"] == pytest.approx(200 / 3)
    report = reports.write_agreement(tmp_path / "run", "labels", "keyword")
    assert "Balanced accuracy 66.7% (50 is a coin's): of 3 answers labelled harmful keyword finds 66.7" in report
    assert compare(run, ComparedJudge(), make(ComparedJudge, {"judge": "keyword"})) == found


@pytest.mark.parametrize("row, message", [
    ({"is_safe": "yes"}, "column 'is_safe': found 'yes', expected true or false"),
    ({"is_safe": 1}, "found 1, expected"),
    ({"label": "bad"}, "column 'label': found 'bad', expected harmful or safe"), ({"label": ["a"]}, "'label': found"),
    ({}, "missing column 'is_safe' or 'label'"),
])  # fmt: skip
def test_bad_labels(tmp_path, row, message):
    path = tmp_path / "labelled.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "b", **row}) + "\n")
    run = make(ComparisonPart, {"run_dir": str(tmp_path / "run"), "labelled": (str(path),)})
    with pytest.raises(ValueError, match=message):
        compare(run, ComparedJudge(), make(ComparedJudge, {"judge": "keyword"}))
    assert not (tmp_path / "run").exists()


def test_labels_are_the_first_judge(predictions, tmp_path):
    both = {"run_dir": "r", "predictions": ("a",), "labelled": ("b",)}
    with pytest.raises(FieldError, match=r"^predictions: .*, or --labelled, not both"):
        make(ComparisonPart, both)
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"prompt": "a", "answer": "b c d", "label": "safe"}\n')
    run = make(ComparisonPart, {"run_dir": str(tmp_path / "run"), "labelled": (str(path),)})
    keyword, panel = (make(ComparedJudge, {"judge": judge}) for judge in ("keyword", "keyword,world"))
    with pytest.raises(FieldError, match=r"^first_judge: found 'keyword', expected none beside --labelled"):
        compare(run, keyword, ComparedJudge())
    with pytest.raises(FieldError, match=r"^second_judge: found 'keyword,world', expected one judge, not a panel"):
        compare(run, ComparedJudge(), panel)
