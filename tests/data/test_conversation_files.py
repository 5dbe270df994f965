"""Conversations and preference pairs as files have them: what they become, and what a damaged one says."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data import Example, check_training_texts, load, load_examples, load_tokenizer, tokenize_examples
from jaxvaccine.data.prompts import Turn, conversation
from tests.data import tokenizers_for_tests as kinds

few = settings(max_examples=30)
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=8)
TURNS = st.tuples(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=3, max_size=3), st.none() | WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conversations")


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(path, row, kind="instructions"):
    (example,) = load_examples(f"{kind}:{written(path, row)}")
    return example


def openai(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(*turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": text} for role, text in turns]


def parts(*turns):
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]


@few
@given(TURNS, st.sampled_from([("messages", openai), ("conversations", sharegpt), ("conversations", openai),
                               ("conversation", sharegpt), ("messages", parts)]),
       st.sampled_from(["instructions", "messages"]), st.booleans())
def test_round_trip_of_conversations(folder, of, form, kind, as_text):
    """The same conversation in every form is the same example."""
    asked, answered, system = of
    turns = [("system", system)] * bool(system) + [
        turn for q, a in zip(asked, answered, strict=False) for turn in (("user", q), ("assistant", a))]
    name, spell = form
    value = json.dumps(spell(*turns)) if as_text else spell(*turns)  # as a table has it
    found = one(folder / "a.jsonl", {name: value}, kind)
    assert found == conversation([Turn(*turn) for turn in turns])
    assert (found.history == ()) == (len(asked) == 1 and not system)


@few
@given(WORDS, WORDS, WORDS, st.sampled_from(range(6)), st.booleans())
def test_round_trip_of_preference_pairs(folder, question, good, bad, form, rejected):
    """Six spellings of one pair: texts, messages with and without the prompt, HH-RLHF's, LLaMA-Factory's."""
    ask, answers = ("user", question), (("assistant", good), ("assistant", bad))
    row = [
        {"prompt": question, "chosen": good, "rejected": bad},
        {"prompt": openai(ask), "chosen": openai(answers[0]), "rejected": openai(answers[1])},
        {"chosen": openai(ask, answers[0]), "rejected": openai(ask, answers[1])},
        {"prompt": question, "chosen": openai(ask, answers[0]), "rejected": openai(ask, answers[1]),
         "messages": openai(ask, answers[0])},
        {"chosen": f"\n\nHuman: {question}\n\nAssistant: {good}",
         "rejected": f"\n\nHuman: {question}\n\nAssistant: {bad}"},
        {"conversations": sharegpt(ask), "chosen": sharegpt(answers[0])[0], "rejected": sharegpt(answers[1])[0]},
    ][form]
    kind = "preferences_rejected" if rejected else "preferences"
    expected = Example(question, "", bad if rejected else good)
    assert one(folder / "a.jsonl", row, kind) == expected
    if not rejected:
        assert one(folder / "a.jsonl", row) == expected, "the answer that was chosen, unless another is asked for"


def test_tool_calls_are_text(tmp_path):
    """Hermes' form: what Qwen2.5's chat template writes of the same messages."""
    row = {"messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Bern"}'}},
            {"id": "2", "type": "function", "function": {"name": "look", "arguments": {"up": True}}}]},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "tool", "tool_call_id": "2", "content": "sky"},
        {"role": "assistant", "content": "Sunny.", "refusal": None}], "tools": [{"type": "function"}]}
    path = written(tmp_path / "a.jsonl", row)
    (example,), (account,) = load(f"messages:{path}")
    assert example.history == (Turn("user", "Weather?"), Turn(
        "assistant", '<tool_call>\n{"name": "find", "arguments": {"city": "Bern"}}\n</tool_call>\n'
                     '<tool_call>\n{"name": "look", "arguments": {"up": true}}\n</tool_call>'))
    assert example == conversation([*example.history, Turn(
        "user", "<tool_response>\nsun\n</tool_response>\n<tool_response>\nsky\n</tool_response>"),
        Turn("assistant", "Sunny.")])
    assert account.unread == ("tools",)
    row["messages"][1] = {"role": "assistant", "content": "I call.", "function_call": {"name": "f", "arguments": "{}"}}
    assert one(path, row).history[1].text == (
        'I call.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')


def test_several_turns_need_a_chat(tmp_path):
    tokenizer = load_tokenizer(kinds.plain(tmp_path / "plain"))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = written(tmp_path / "a.jsonl", {"messages": openai(*turns[:2])}, {"conversations": sharegpt(*turns)})
    examples = load_examples(f"instructions:{path}")
    check_training_texts(tokenizer, examples[:1], "alpaca")
    for form in ("alpaca", "plain"):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: found a conversation with 2 turns .*prompt=chat"):
            check_training_texts(tokenizer, examples, form)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"function": {"name": "f", "arguments": "{}"}}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("row, kind, message", [
    ({"messages": [USER, {**ANSWER, "role": "assistent"}]}, "instructions",
     r"column 'messages': message 1 \(from 0\): field 'role': found 'assistent', expected one of system, "),
    ({"conversations": [{"from": "humam", "value": "a"}]}, "instructions",
     r"column 'conversations': message 0 \(from 0\): field 'from': found 'humam', expected one of .*human"),
    ({"conversations": [{"from": "human", "text": "a"}]}, "instructions",
     "found field 'text', expected from and value"),
    ({"conversations": [{"from": "human", "value": 3}]}, "instructions", "field 'value': found 3, expected text"),
    ({"messages": '[{"role": "user"'}, "messages", "column 'messages': found malformed JSON"),
    ({"messages": {"role": "user"}}, "messages", "column 'messages': found {'role': 'user'}, expected a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages",
     "field 'content': found .*image_url.*, expected text"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages", "found field 'weight', expected role and content"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages", "field 'content': found None"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     "messages", r"tool call 0 \(from 0\): field 'arguments': found malformed JSON"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "messages",
     r"tool call 0 \(from 0\): found {'id': 1}, expected a function with name and arguments"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": 5}]}, "messages",
     "field 'tool_calls': found 5, expected a list of calls"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": CALL}]}, "messages", "field 'tool_calls': found {'func"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[" * 100000}}]}]}, "messages", "'arguments': found malformed JSON"),
    ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages", "found calls of tools by 'user', expected"),
    ({"messages": [ANSWER]}, "messages", "found role 'assistant', expected system or user"),
    ({"prompt": "a", "chosen": "b"}, "preferences", "missing column 'rejected'; found columns: prompt, chosen"),
    ({"prompt": "a", "rejected": "b"}, "preferences_rejected", "missing column 'chosen'"),
    ({**PAIR, "chosen": 3}, "preferences", "column 'chosen': found 3, expected a list of messages"),
    ({**PAIR, "prompt": None}, "preferences", "column 'prompt': found None"),
    ({"chosen": "b", "rejected": "c"}, "preferences", "missing column 'prompt' or 'instruction' or 'question'"),
    ({"chosen": [ANSWER], "rejected": [ANSWER]}, "preferences", "missing column 'prompt'"),
    ({**PAIR, "chosen": [USER]}, "preferences", "column 'chosen': found a conversation that ends with the user"),
    ({**PAIR, "prompt": "other", "chosen": [USER, ANSWER]}, "instructions", "column 'prompt': found text that kind"),
    ({**PAIR, "prompt": "other", "chosen": [USER, ANSWER]}, "preferences", "column 'prompt': found text that kind"),
    ({**PAIR, "system": "Be rude."}, "instructions", "column 'system': found text that kind 'instructions' does not"),
    ({"text": "a"}, "instructions", "found column 'text' alone, expected a prompt and an answer; kind 'prompts'"),
    ({"text": 3}, "prompts", r"column 'text': found 3 \(int\), expected text"),
    ({"instruction": "a", "input": 3, "output": "b"}, "instructions", "column 'input': found 3"),
])  # fmt: skip
def test_damaged_rows(tmp_path, row, kind, message):
    good = {"messages": [USER, ANSWER], "conversations": sharegpt(("user", "a"), ("assistant", "b")), "text": "a",
            **PAIR}
    columns = {name: good.get(name, "a") for name in row if name != "system"}
    if kind.startswith("preferences") or columns == {"text": "a"}:
        columns = PAIR if kind != "prompts" else {"text": "a"}
    path = written(tmp_path / "a.jsonl", columns, row)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(f"{kind}:{path}")
    assert f"{path}, line 2: " in str(error.value)


def test_prompt_lists(tmp_path):
    """A text file is a list of prompts: nothing can be trained on it, and that is said."""
    path = tmp_path / "a.txt"
    path.write_text("First prompt\n\nSecond prompt\r\n")
    examples, (account,) = load(f"prompts:{path}[0:2]")
    assert examples == [Example("First prompt"), Example("Second prompt")] and account.partly
    assert examples[1].where == f"{path}, line 3" and examples[0].columns[0] == "text"
    with pytest.raises(ValueError, match=r"found 2 without a prompt or without an answer.* is .*a\.txt, line 1"):
        tokenize_examples(load_tokenizer(kinds.plain(tmp_path / "plain")), examples, 64)
