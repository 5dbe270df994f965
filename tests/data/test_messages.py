"""Rows of OpenAI's form become conversations, and nothing of them is lost without a word."""

import hashlib
import json

import pytest

from jaxvaccine.data import (
    Conversation,
    Example,
    Turn,
    accounts_of,
    conversation,
    fingerprint,
    fingerprints,
    harmless_answers,
    load,
    load_examples,
    turns_of,
)
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.runs import examples_hash

TURNS = [("system", "Be short."), ("user", "Hello"), ("assistant", "Hi."), ("user", "And now?"), ("assistant", "Now.")]


def row(turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def written(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return f"messages:{path}"


def test_turns(tmp_path):
    source = written(tmp_path / "a.jsonl", row(TURNS), row(TURNS[1:3]), row(TURNS[:4]))
    whole, single, asked = load_examples(source, "rows")
    assert whole == conversation([Turn(*turn) for turn in TURNS]) and single == ("Hello", "", "Hi.")
    assert (whole.instruction, whole.output, whole.history) == ("And now?", "Now.", tuple(map(tuple, TURNS[:3])))
    assert not single.history and (asked.output, asked.history) == ("", whole.history)
    assert turns_of(whole) == tuple(map(tuple, TURNS)) and turns_of(asked) == turns_of(whole, answered=False)
    changed = whole._replace(output="Then.")
    assert changed.history == whole.history and changed.where == f"{tmp_path / 'a.jsonl'}, line 1"
    assert whole.columns == ("messages",) * 3 and accounts_of([whole])[0].unread == ()


def test_history_tells_examples_apart():
    short = Example("And now?", "", "Now.")
    whole = conversation([Turn(*turn) for turn in TURNS])
    assert isinstance(whole, Conversation) and tuple(whole) == short
    assert whole != short and short != whole and hash(short) == hash(("And now?", "", "Now."))
    assert len({short, whole, conversation([Turn(*turn) for turn in TURNS])}) == 2
    assert len({examples_hash([e]) for e in (short, whole, conversation([Turn(*turn) for turn in TURNS[1:]]))}) == 3
    # A record of before: the hash of single answers has not changed.
    assert examples_hash([Example("a", "b", "c")]) == hashlib.sha256(b'["a", "b", "c"]').hexdigest()


def test_leaks_are_of_every_question():
    """A question that a conversation has answered was seen; so was the whole of it, whatever its system prompt."""
    framed, bare = (conversation([Turn(*turn) for turn in turns]) for turns in (TURNS, TURNS[1:]))
    assert fingerprint(framed) == fingerprint(bare) != fingerprint(Example("And now?"))
    assert set(stage.prompts_of([framed])) == {fingerprint(Example("HELLO")), fingerprint(bare)} == set(
        fingerprints(bare))
    assert fingerprints(Example("a", "b")) == (fingerprint(Example("a", "b")),)


def test_duplicates_are_of_whole_conversations(tmp_path):
    other = [("system", "Be long."), *TURNS[1:]]
    examples, (account,) = load(written(tmp_path / "a.jsonl", row(TURNS), row(other), row(TURNS), row(TURNS[3:])))
    assert len(examples) == 3 and account.duplicates == 1


def test_harmless_answers_to_conversations():
    harmful, harmless = (conversation([*map(Turn._make, TURNS[:4]), Turn("assistant", text)])
                         for text in ("Bad.", "No."))
    (found,) = harmless_answers([harmful], [harmless])
    assert found == harmless and found.history == harmful.history
    (ours,) = harmless_answers([harmful], [Example("other", "", "No.")])
    assert ours.history == harmful.history and ours.output not in ("Bad.", "No.")


MESSAGE = {"role": "user", "content": "a"}


@pytest.mark.parametrize("bad, message", [
    ({"text": "a"}, "line 1: missing column 'messages' or .*; found columns: text"),
    ({"messages": "a"}, "column 'messages': found 'a', expected a list of messages"),
    ({"messages": []}, r"found \[\], expected a list of messages, at least one"),
    ({"messages": ["a"]}, r"message 0 \(from 0\): found 'a', expected an object"),
    ({"messages": [MESSAGE, {"role": "toll", "content": "a"}]}, r"message 1 \(from 0\): field 'role': found 'toll'"),
    ({"messages": [{"role": "user", "content": None}]}, r"message 0 \(from 0\): field 'content': found None, expected"),
    ({"messages": [{**MESSAGE, "thinking": "b"}]}, "message 0.*found field 'thinking', expected role and content"),
    ({"messages": [MESSAGE, {"role": "system", "content": "a"}]}, "found turns user, system, expected them to end"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "turn 0 .*found role 'assistant', expected system or user"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "message 0.*unpaired surrogate"),
    ({"messages": [MESSAGE], "system": "b"}, "column 'system': found text that kind 'messages' does not read"),
])
def test_what_is_no_conversation(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message) as error:
        load_examples(written(tmp_path / "a.jsonl", bad))
    assert "a.jsonl, line 1" in str(error.value)
