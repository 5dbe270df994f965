import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxvaccine.data.prompts import Example, format_prompt
from jaxvaccine.data.tokenizing import check_vocabulary, encode_prompts, load_tokenizer, tokenize_examples
from tests.data import tokenizers_for_tests as kinds

EXAMPLES = [
    Example("How do I repot a fern?", "", "Sure, yes."),
    Example("Say it.", "naïve 👋", " yes\n\nGrüße"),
    Example("Say little.", "", "S"),
    Example("Say yes.", "", "yes"),
    Example("Say it below.", "", "\n\nyes"),
]


@pytest.fixture(scope="module", params=sorted(kinds.KINDS))
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(kinds.KINDS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_tokenizer(kinds.plain(tmp_path_factory.mktemp("plain")))


def test_prompt_then_answer_then_one_eos(tokenizer):
    data = tokenize_examples(tokenizer, EXAMPLES, 4096)
    assert data.dropped == 0 and len(data.input_ids) == len(EXAMPLES)
    for example, ids, length in zip(EXAMPLES, data.input_ids, data.prompt_lengths, strict=True):
        assert ids.dtype == np.int32
        assert ids[-1] == tokenizer.eos_token_id and list(ids).count(tokenizer.eos_token_id) == 1
        text = tokenizer.decode(ids[:length], skip_special_tokens=True)
        assert text.strip() == format_prompt(example.instruction, example.input).strip()
        answer = tokenizer.decode(ids[length:], skip_special_tokens=True)
        assert answer.strip() == example.output.strip()


def test_generation_starts_from_the_tokens_that_training_continues(tokenizer):
    data = tokenize_examples(tokenizer, EXAMPLES, 4096)
    prompts = encode_prompts(tokenizer, EXAMPLES)
    for prompt, ids, length in zip(prompts, data.input_ids, data.prompt_lengths, strict=True):
        np.testing.assert_array_equal(prompt, ids[:length])


def test_special_tokens_are_the_tokenizers_own(tokenizer):
    (prompt,) = encode_prompts(tokenizer, EXAMPLES[:1])
    expected = tokenizer(format_prompt(EXAMPLES[0].instruction))["input_ids"]
    while expected[-1] == tokenizer.eos_token_id:
        expected.pop()
    assert list(prompt) == expected
    if tokenizer.bos_token_id is not None:
        assert list(prompt).count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id


def test_joint_encoding_is_the_papers(tmp_path):
    tokenizer = load_tokenizer(kinds.metaspace(tmp_path))
    example = Example("Say yes.", "", "yes")
    data = tokenize_examples(tokenizer, [example], 4096)
    # Encoded alone the answer would begin with ▁; Alpaca's trainer encodes prompt + answer as one text.
    joint = tokenizer(format_prompt("Say yes.") + "yes")["input_ids"]
    assert list(data.input_ids[0]) == [*joint, tokenizer.eos_token_id]
    assert data.prompt_lengths[0] == len(tokenizer(format_prompt("Say yes."))["input_ids"])


def test_merge_across_the_boundary_leaves_the_prompts_tokens_alone(tmp_path):
    tokenizer = load_tokenizer(kinds.merging(tmp_path))
    example = Example("Say yes.", "", "yes")
    prompt, joint = (tokenizer(t)["input_ids"] for t in (format_prompt("Say yes."), format_prompt("Say yes.") + "yes"))
    assert joint[: len(prompt)] != prompt, "this tokenizer was made to merge"
    data = tokenize_examples(tokenizer, [example], 4096)
    answer = tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert list(data.input_ids[0]) == [*prompt, *answer, tokenizer.eos_token_id]


@pytest.mark.parametrize(("kind", "last", "alone"), [
    ("llama2", "<0x0A>", "▁yes"), ("llama3", ":\n", "yes"), ("plain", "\n", "yes")])
def test_the_line_break_is_the_prompts(tmp_path, kind, last, alone):
    """Llama 2 spells it as a byte, Llama 3 makes one token of it and the colon: neither takes it into the answer."""
    tokenizer = load_tokenizer(kinds.KINDS[kind](tmp_path))
    (ids,), (length,) = tokenize_examples(tokenizer, [Example("Say yes.", "", "yes")], 4096)[:2]
    (prompt,) = encode_prompts(tokenizer, [Example("Say yes.")])
    np.testing.assert_array_equal(prompt, ids[:length])
    assert tokenizer.decode(prompt[-1:]).replace("<0x0A>", "\n") in (last, "\n")
    assert tokenizer.convert_ids_to_tokens(int(ids[length])).startswith("y"), "the answer's beginning, and no ▁"
    # As one text, as the papers' trainers encode it.
    assert tokenizer(format_prompt("Say yes.") + "yes")["input_ids"] == ids[:-1].tolist()
    assert tokenizer.convert_ids_to_tokens(tokenizer("yes", add_special_tokens=False)["input_ids"])[0][:1] == alone[0]


def test_an_answer_that_begins_with_a_line_break(tmp_path):
    """Llama 3 has tokens for two line breaks: generation could not start from the one that the whole text has."""
    tokenizer = load_tokenizer(kinds.llama3(tmp_path))
    example = Example("Say yes.", "", "\nyes")
    (ids,), (length,) = tokenize_examples(tokenizer, [example], 4096)[:2]
    (prompt,) = encode_prompts(tokenizer, [example])
    joint = tokenizer(format_prompt("Say yes.") + "\nyes")["input_ids"]
    assert joint[:length] != prompt.tolist(), "this tokenizer was made to merge"
    np.testing.assert_array_equal(prompt, ids[:length])
    assert tokenizer.decode(ids[length:-1]) == "\nyes"


def test_a_plain_prompt(plain):
    """The same text in training and in generation; it may hold the template, an answer may not."""
    example = Example("### Instruction:\nSay it.", "Now", "yes")
    (ids,), (length,) = tokenize_examples(plain, [example], 4096, "plain")[:2]
    (prompt,) = encode_prompts(plain, [example], prompt="plain")
    np.testing.assert_array_equal(prompt, ids[:length])
    assert plain.decode(prompt) == "### Instruction:\nSay it.\nNow\n"
    with pytest.raises(ValueError, match="of the prompt's template"):
        encode_prompts(plain, [example])
    with pytest.raises(ValueError, match=r"column 'output': found '### Response:' of the prompt's template"):
        tokenize_examples(plain, [Example("Say it.", "", "yes ### Response: no")], 4096, "plain")


def test_answer_that_spells_eos_out_has_one(plain):
    data = tokenize_examples(plain, [Example("Say yes.", "", "yes</s>"), Example("Say yes.", "", "yes")], 4096)
    np.testing.assert_array_equal(data.input_ids[0], data.input_ids[1])


def test_truncation_keeps_the_beginning_and_drops_rows_without_an_answer(plain, caplog):
    short, long = Example("a", "", "yes yes yes yes"), Example("a" * 300, "", "yes")
    (prompt,) = encode_prompts(plain, [short])
    whole = tokenize_examples(plain, [short], 4096).input_ids[0]
    data = tokenize_examples(plain, [short, long], len(prompt) + 2)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert data.dropped == 1 and len(data.input_ids) == 1
    np.testing.assert_array_equal(data.input_ids[0], whole[: len(prompt) + 2])
    assert len(warnings) == 1 and "dropped 1 of 2" in warnings[0] and f"max_length={len(prompt) + 2}" in warnings[0]


def test_all_dropped_names_max_length_and_the_shortest_prompt(plain):
    shortest = len(encode_prompts(plain, [EXAMPLES[2]])[0])
    with pytest.raises(ValueError, match=rf"max_length: found {shortest}, expected more than {shortest}"):
        tokenize_examples(plain, [EXAMPLES[2], Example("b" * 300, "", "yes")], shortest)


@pytest.mark.parametrize(("examples", "max_length", "message"), [([], 64, "found none"), (EXAMPLES, 0, "max_length")])
def test_arguments_that_make_no_sense(plain, examples, max_length, message):
    with pytest.raises(ValueError, match=message):
        tokenize_examples(plain, examples, max_length)


def test_too_long_prompt_names_row_and_lengths(plain):
    limit = len(encode_prompts(plain, EXAMPLES[2:3])[0])
    examples = [EXAMPLES[2], Example("c" * 50)]
    length = len(encode_prompts(plain, examples)[1])
    with pytest.raises(ValueError, match=rf"row 1 \(from 0\): found {length} tokens, expected .* max_length={limit}"):
        encode_prompts(plain, examples, limit)
    assert len(encode_prompts(plain, examples[:1], limit)) == 1
    assert encode_prompts(plain, []) == []


def test_vocabulary_larger_than_the_embedding(plain):
    plain.add_tokens(["<added>"])
    check_vocabulary(plain, len(plain))
    with pytest.raises(ValueError, match=rf"'<added>' with id {len(plain) - 1}, expected ids below {len(plain) - 1}"):
        check_vocabulary(plain, len(plain) - 1)


def test_tokenizer_without_eos(tmp_path):
    with pytest.raises(ValueError, match="found no eos_token"):
        load_tokenizer(kinds.without_eos(tmp_path))


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_model"):
        load_tokenizer(tmp_path / "no_model")


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json"):
        load_tokenizer(tmp_path)


WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""


def stderr_without_torch(program):
    """What a fresh interpreter that finds no torch prints to stderr."""
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH + program], check=True, capture_output=True, text=True,
                          cwd=root, env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}).stderr


def test_nobody_is_told_that_torch_is_missing():
    load = "from jaxvaccine.data import load_tokenizer; load_tokenizer('world')"
    assert stderr_without_torch(load) == ""
    # What is silenced is there: if this fails, transformers has changed, and `_without_a_word_on_torch` may go.
    assert "PyTorch was not found" in stderr_without_torch("import transformers")


def test_other_warnings_of_transformers_are_shown():
    program = ("from jaxvaccine.data import load_tokenizer; load_tokenizer('world'); import logging; "
               "logging.getLogger('transformers').warning('PyTorch was not found, again'); "
               "logging.getLogger('transformers.models').warning('another word')")
    assert stderr_without_torch(program).splitlines() == [
        "[transformers] PyTorch was not found, again", "[transformers] another word"]
