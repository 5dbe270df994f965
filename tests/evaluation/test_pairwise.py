"""AlpacaEval's win rate, against a real HTTP server on the loopback address."""

import json

import pytest

from jaxvaccine.data.alpaca_eval import alpaca_eval
from jaxvaccine.data.prompts import Example
from jaxvaccine.evaluation import score_answers, wilson_interval
from jaxvaccine.evaluation.chat_api import Endpoint
from jaxvaccine.evaluation.pairwise import Preference, chat_comparer, read_preference, score_alpaca_eval
from tests.evaluation.test_chat_api import SECRET, reply, serve  # noqa: F401

EXAMPLES = [Example(f"Task {i}, <instruction> {{x}}?", "", f"reference {i}") for i in range(4)]
ANSWERS = ["better 0", "worse 1", "equal 2", "lucky 3"]


def of_answers(body):
    """What a judge that knows the answers' first words replies; it has a liking for A where it is to be lucky."""
    text = body["messages"][1]["content"]
    first, second = (text.split(f"<answer_{name}>\n")[1].split("\n</answer")[0] for name in "ab")
    words = {first.split()[0], second.split()[0]}
    if "equal" in words:
        return "tie"
    if "lucky" in words:
        return "A"
    good = "better" if "better" in words else "reference"
    return "A" if first.startswith(good) else "B"


def comparer(server, **changes):
    return chat_comparer(Endpoint(server.url, "judge-1", key=SECRET, backoff=0.01, attempts=3, **changes))


def test_both_orders(serve, tmp_path):  # noqa: F811
    server = serve(lambda n, body: reply(f"Reasons.\n#winner: {of_answers(body)}"))
    result = score_alpaca_eval(EXAMPLES, ANSWERS, comparer(server, cache=tmp_path))
    assert [(p.verdict, p.score, p.counts) for p in result.predictions] == [
        ("win", 1.0, True), ("loss", 0.0, False), ("tie", 0.5, False), ("mixed", 0.5, False)]
    assert (result.score, result.n, result.unread) == (50.0, 4, 0)
    assert result.interval == pytest.approx(wilson_interval(2, 4))
    assert result.details == {"mean_length": 7.25, "reference_mean_length": 11.0, "same_verdict_in_both_orders": 75.0}
    assert [p.expected for p in result.predictions] == [e.output for e in EXAMPLES]
    assert result.predictions[3].reason == "answer as A: a; answer as B: a"
    assert len(server.requests) == 8 and server.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
    texts = [body["messages"][1]["content"] for _, _, body in server.requests]
    assert all(sum(f"<answer_a>\n{a}\n" in t for t in texts) == 1 for a in ANSWERS + [e.output for e in EXAMPLES])
    assert score_alpaca_eval(EXAMPLES, ANSWERS, comparer(server, cache=tmp_path)) == result
    assert len(server.requests) == 8, "a re-run asks nothing"


@pytest.mark.parametrize("bad", [reply("I cannot choose."), reply(None), (400, b"content filter"), (200, b"{")])
def test_what_cannot_be_read_is_neither_won_nor_lost(serve, bad):  # noqa: F811
    def respond(n, body):
        return bad if "<answer_a>\nbetter" in body["messages"][1]["content"] else reply(f"#winner: {of_answers(body)}")

    result = score_alpaca_eval(EXAMPLES[:2], ANSWERS[:2], comparer(serve(respond)))
    assert [p.verdict for p in result.predictions] == ["unread", "loss"]
    assert (result.score, result.n, result.unread) == (0.0, 1, 1)
    with pytest.raises(ValueError, match=r"could read both verdicts of none of 1 prompts; the first: answer as A: "):
        score_alpaca_eval(EXAMPLES[:1], ANSWERS[:1], comparer(serve(respond)))


def test_retries_and_a_server_that_stays_away(serve):  # noqa: F811
    server = serve(lambda n, body: (429, b"slow down") if n == 1 else reply("#winner: A"))
    assert score_alpaca_eval(EXAMPLES[:1], ANSWERS[:1], comparer(server, workers=1)).score == 50.0
    assert len(server.requests) == 3
    with pytest.raises(ConnectionError, match="HTTP 500"):
        score_alpaca_eval(EXAMPLES, ANSWERS, comparer(serve(lambda n, body: (500, b"broken"))))


@pytest.mark.parametrize("text, score", [
    ("#winner: A", 1), ("Reasons.\n#winner: B\n", 0), ("**#winner: tie**", 0.5), ("# Winner : a", 1),
    ("#winner:\nB", 0), ("#winner: A\n#winner: B", 0), ("`#winner: <A>`", 1), ("#winner: B.", 0), ("#WINNER: TIE", 0.5),
    ("**#winner:** A", 1), ("#winner: Answer A", None), ("#winner: C", None), ("winner: A", None), ("A", None),
    ("", None),
    ("the line #winner: A is what I was asked for", None), ("#winner: tied", None), ("#winner: AB", None),
    ("#winner: A or B", None), ("#winner: A\r\n", 1), ("#winner: A\n\nB was weaker.", None),
    ("<think>\n#winner: A\n</think>\nBoth are good.", None),
    ("B.\n</think>\n#winner: B", 0), ("> #winner: A", None), ("#winner: A\n```\n#winner: B\n```", None),
    ("<answer_a>\n#winner: A\n</answer_a>\n#winner: tie", 0.5),
])  # fmt: skip
def test_replies(text, score):
    assert read_preference(text).score == score


@pytest.mark.parametrize("examples, answers, verdicts, message", [
    ([], [], 0, "task alpaca_eval: found no examples"),
    ([Example("a", "", " ")], ["x"], 2, "example 0 .*found ' ', expected a reference model's output"),
    (EXAMPLES, ["x"], 2, "found 1 answers, expected one for each of 4"),
    (EXAMPLES[:1], ["x"], 1, "found 1 verdicts, expected two for each of 1"),
])
def test_bad_input(examples, answers, verdicts, message):
    with pytest.raises(ValueError, match=message):
        score_alpaca_eval(examples, answers, lambda *args: [Preference(1.0, "a")] * verdicts)


def test_no_judge_of_single_answers_scores_it():
    with pytest.raises(ValueError, match=r"expected pairwise\.score_alpaca_eval"):
        score_answers("alpaca_eval", EXAMPLES, ANSWERS)


ROW = {"instruction": " Name\u2028a colour. ", "output": "Red.\r\n", "generator": "m", "dataset": "koala"}


def test_rows():
    assert alpaca_eval([ROW]) == [Example("Name\u2028a colour.", "", "Red.")]
    assert alpaca_eval([{"instruction": "a", "output": "b"}]) == [Example("a", "", "b")]


@pytest.mark.parametrize("change, message", [
    ({"output": " \n"}, "row 1 .*column 'output': found no text"),
    ({"generator": "other"}, "row 1 .*column 'generator': found 'other', expected 'm'"),
    ({"instruction": None}, "row 1 .*column 'instruction': found None"),
])
def test_bad_rows(change, message):
    with pytest.raises(ValueError, match=message):
        alpaca_eval([ROW, {**ROW, **change}])
    with pytest.raises(ValueError, match=r"row 0 .*missing column 'output'"):
        alpaca_eval([{"instruction": "a"}])


def test_formats(tmp_path):
    from jaxvaccine.data import load_examples

    rows = [{**ROW, "instruction": f"task {i % 3}"} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\r\n".join(map(json.dumps, rows)))
    for name in ("a.json", "a.jsonl"):
        examples = load_examples(f"alpaca_eval:{tmp_path / name}")
        assert [e.instruction for e in examples] == ["task 0", "task 1", "task 2"]
