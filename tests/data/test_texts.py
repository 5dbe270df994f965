"""Texts that hold nothing, the template, or a special token: found by row and column, in prompts and answers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data import Example, check_prompts, encode_prompts, load_examples, load_tokenizer, tokenize_examples
from jaxvaccine.data.prompts import format_prompt
from jaxvaccine.data.texts import check_template, control_tokens, is_blank, without_eos
from tests.data import tokenizers_for_tests as kinds

few = settings(max_examples=50)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_tokenizer(kinds.plain(tmp_path_factory.mktemp("plain")))


def file_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b", "\ufeff \u2060", "\xa0\u3000", "\x00"])
def test_blank(text):
    assert is_blank(text)


@few
@given(st.text(max_size=5), st.characters(categories=("L", "N", "S", "P")), st.text(max_size=5))
def test_what_can_be_seen_is_not_blank(before, visible, after):
    assert not is_blank(before + visible + after)


@pytest.mark.parametrize("holds", [
    format_prompt("Say hi"), format_prompt("Say hi", "to me"), "### Instruction:\nSay hi", "hi\n\n### Response:",
    "###response : hi", "## text\n### INSTRUCTION:", "Below is an instruction that describes a task. Say hi"])
@pytest.mark.parametrize("field", [0, 1])
def test_a_prompt_that_holds_the_template(plain, holds, field):
    example = Example("Say hi")._replace(**{Example._fields[field]: holds})
    message = rf"row 1 \(from 0\): column '{Example._fields[field]}': found '.*' of the prompt's template at character"
    for call in (lambda rows: check_template(rows), lambda rows: encode_prompts(plain, rows),
                 lambda rows: tokenize_examples(plain, [e._replace(output="hi") for e in rows], 4096)):
        with pytest.raises(ValueError, match=message):
            call([Example("Say yes"), example])


@pytest.mark.parametrize("text", [
    "### Input:\n3", "#### 42", "An instruction: a response", "What does '### Responses' mean?",
    "Above is an instruction that describes a task."])
def test_what_is_not_the_template(plain, text):
    check_template([Example(text, text)])
    assert len(tokenize_examples(plain, [Example(text, text, text)], 4096).input_ids) == 1


def test_an_answer_that_holds_the_template(plain, tmp_path):
    """Training would teach to go on with another task; a reference to compare with may be so."""
    path = file_of(tmp_path / "a.jsonl", {"prompt": "Say hi", "completion": "hi\n\n### Instruction:\nSay yes"})
    (example,) = load_examples(f"instructions:{path}")
    check_prompts(plain, [example])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: column 'completion': found '### Instruction:'"):
        tokenize_examples(plain, [example], 4096)


@pytest.mark.parametrize("token", ["</s>", "<s>"])
@pytest.mark.parametrize("row", [
    {"question": "Say {} twice", "answer": "yes"}, {"question": "Say", "context": "it{}", "answer": "yes"},
    {"question": "Say it", "answer": "{}yes"}, {"question": "Say it", "answer": "yes {} no"}])
def test_a_special_token(plain, tmp_path, token, row):
    """Named with file, line and column; as text it could not be told from the token that ends an answer."""
    column = next(name for name, text in row.items() if "{}" in text)
    row = {name: text.format(token) for name, text in row.items()}
    path = file_of(tmp_path / "a.jsonl", {"question": "Say no", "answer": "no"}, row)
    examples = load_examples(f"instructions:{path}")
    message = rf"a\.jsonl, line 2: column '{column}': found '{token}', a special token of the tokenizer, at character"
    with pytest.raises(ValueError, match=message):
        tokenize_examples(plain, examples, 4096)
    if column != "answer":
        with pytest.raises(ValueError, match=message):
            encode_prompts(plain, examples)


def test_the_worlds_tokens():
    world = load_tokenizer("world")
    assert {"<eos>", "<unk>", "\n\n### Response:\n"} <= set(control_tokens(world))
    for text in ("rate : what a <eos>", "rate : <unk> plot"):
        with pytest.raises(ValueError, match="a special token"):
            encode_prompts(world, [Example(text)])
    # Unknown words become the token; they do not spell it.
    assert tokenize_examples(world, [Example("rate : zebra", "", "positive")], 16).cut == 0


def test_control_tokens_that_are_not_called_special(plain):
    tokenizer = load_tokenizer(plain.name_or_path)
    tokenizer.add_tokens(["<|User|>", "<｜tool｜>", "<think>", "  "])
    assert {"<|User|>", "<｜tool｜>", "</s>"} <= set(control_tokens(tokenizer)) and "<think>" not in control_tokens(
        tokenizer)
    encode_prompts(tokenizer, [Example("a  b <think>")])
    with pytest.raises(ValueError, match=r"found '<\|User\|>', a special token"):
        encode_prompts(tokenizer, [Example("a <|User|> b")])


@few
@given(st.text(alphabet="ab \n", max_size=6), st.integers(0, 3), st.sampled_from(["", " ", "\n"]))
def test_without_eos(text, times, space):
    spelled = text + ("</s>" + space) * times
    assert without_eos(spelled, "</s>") == text


@pytest.mark.parametrize("ending", ["</s>", "</s></s>", "</s>\n", "</s> </s>"])
def test_an_answer_that_ends_in_eos(plain, ending):
    one, two = tokenize_examples(plain, [Example("Say yes.", "", "yes" + ending), Example("Say yes.", "", "yes")],
                                 4096).input_ids
    assert one.tolist() == two.tolist()


@pytest.mark.parametrize("prompt", [Example(""), Example(" \n", "\u200b"), Example("", "\ufeff")])
def test_an_empty_prompt_is_no_test(plain, prompt):
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): column 'instruction': found an empty prompt"):
        encode_prompts(plain, [Example("Say yes"), prompt])
    assert len(encode_prompts(plain, [Example("", "Say yes")])) == 1, "an input alone asks something"
