"""Ids and masks of conversations are transformers', where it has them."""

import logging
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data import (
    Example,
    Prompt,
    Turn,
    chat,
    conversation,
    encode_prompts,
    eos_ids,
    load_tokenizer,
    tokenize_examples,
    training_fates,
    turns_of,
)
from jaxvaccine.data.batching import check_batch, collate
from tests.data import chat_models, tokenizers_for_tests
from tests.data.chat_models import KINDS

CHAT, LAST = Prompt("chat"), Prompt("chat", supervise="last")
SHORT = Example("How do I repot a fern?", "", "Take a larger pot.")
SAID = conversation([Turn("user", "Hello"), Turn("assistant", "Yes, what is it?"),
                     Turn("user", "Say  naïve 👋"), Turn("assistant", "naïve 👋")])
FRAMED = conversation([Turn("system", "Be short."), *turns_of(SAID)])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The tokenizer of a kind, with its own template or another one."""
    made = {}

    def load(kind, template=None):
        if (kind, template) not in made:
            path = chat_models.save_tokenizer(kind, tmp_path_factory.mktemp(kind), template)
            made[kind, template] = load_tokenizer(path)
        return made[kind, template]
    return load


def messages(example, answered=True):
    return [{"role": turn.role, "content": turn.text} for turn in turns_of(example, answered=answered)]


def rows_of(kind):
    return [SHORT, SAID, *([FRAMED] if KINDS[kind].takes_system and kind != "mistral" else [])]


def theirs(tokenizer, example, **options):
    return tokenizer.apply_chat_template(messages(example), tokenize=True, return_dict=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_transformers(tokenizer, kind):
    of, rows = tokenizer(kind), rows_of(kind)
    found = tokenize_examples(of, rows, 512, CHAT)
    for row, ids in zip(rows, found.input_ids, strict=True):
        np.testing.assert_array_equal(ids, theirs(of, row)["input_ids"])
        assert of.bos_token is None or list(ids).count(of.bos_token_id) == 1
    for row, ids in zip(rows, encode_prompts(of, rows, prompt="chat"), strict=True):
        np.testing.assert_array_equal(ids, of.apply_chat_template(
            messages(row, answered=False), add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [CHAT, LAST])
def test_masks_are_those_of_a_template_that_marks_answers(tokenizer, kind, prompt):
    """Transformers' mask of the same template with {% generation %} around the answer and its end of turn; by marks and
    by prefixes alike."""
    by_prefix, marked, rows = tokenizer(kind), tokenizer(kind, KINDS[kind].marked()), rows_of(kind)
    found, other = (tokenize_examples(of, rows, 512, prompt) for of in (by_prefix, marked))
    for row, ids, learnt, also in zip(rows, found.input_ids, found.learnt, other.learnt, strict=True):
        expected = np.asarray(theirs(marked, row, return_assistant_tokens_mask=True)["assistant_masks"], bool)
        if prompt == LAST:
            end = np.flatnonzero(expected)[-1]
            expected[:np.flatnonzero(~expected[:end])[-1]] = False
        np.testing.assert_array_equal(learnt, expected)
        np.testing.assert_array_equal(also, expected)
        ends = np.flatnonzero(learnt & ~np.append(learnt[1:], False))
        assert np.isin(ids[ends], eos_ids(by_prefix)).all()  # each answer's end is learnt
        assert len(ends) == (1 if prompt == LAST else len([t for t in turns_of(row) if t.role == "assistant"]))


def test_learnt_is_the_text_of_the_answers(tokenizer):
    of = tokenizer("llama3")
    found = tokenize_examples(of, [FRAMED], 512, CHAT)
    batch = collate(found, [0], 256)
    check_batch(batch, len(of))
    labels = batch["labels"][0]
    assert of.decode(labels[labels != -100].tolist()) == "Yes, what is it?<|eot_id|>naïve 👋<|eot_id|>"
    labels = collate(tokenize_examples(of, [FRAMED], 512, LAST), [0])["labels"][0]
    assert of.decode(labels[labels != -100].tolist()) == "naïve 👋<|eot_id|>"


def test_a_mark_without_the_end_is_transformers_and_is_warned_of(tokenizer, caplog):
    """What a template marks counts, as transformers has it; that its answers do not end is said."""
    marked = chat_models.QWEN.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}")
    of = tokenizer("qwen2", marked)
    with caplog.at_level(logging.WARNING):
        found = tokenize_examples(of, [SHORT, SAID], 512, CHAT)
    for row, learnt in zip([SHORT, SAID], found.learnt, strict=True):
        mask = theirs(of, row, return_assistant_tokens_mask=True)["assistant_masks"]
        np.testing.assert_array_equal(learnt, np.asarray(mask, bool))
    assert "2 of 2 answers end" in caplog.text and "does not learn to stop" in caplog.text


TEXT = st.text(string.ascii_letters + string.punctuation.replace("<", "") + " \n" + "éñ👋字", min_size=1, max_size=12
               ).filter(lambda text: text.strip())


@settings(max_examples=40)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_any_conversation(tokenizer, kind, said):
    of = tokenizer(kind)
    row = conversation([Turn(role, text) for pair in said
                        for role, text in zip(("user", "assistant"), pair, strict=True)])
    found = tokenize_examples(of, [row], 4096, CHAT)
    np.testing.assert_array_equal(found.input_ids[0], theirs(of, row)["input_ids"])
    # As many answers as there are, each learnt to its end; nothing of a question.
    starts = np.flatnonzero(found.learnt[0] & ~np.append(False, found.learnt[0][:-1]))
    assert len(starts) == len(said)
    learnt = of.decode(found.input_ids[0][found.learnt[0]].tolist(), skip_special_tokens=True)
    answers = "".join(text if kind == "qwen2" else text.strip() for _, text in said)
    if kind != "mistral":  # whose tokens do not say where spaces were, and lack letters
        assert learnt == answers


def test_system_prompts(tokenizer):
    of = tokenizer("qwen2")
    default, given, own = (of.decode(encode_prompts(of, [row], prompt=prompt)[0].tolist()) for row, prompt in (
        (SHORT, CHAT), (SHORT, Prompt("chat", "Be kind.")), (FRAMED, Prompt("chat", "Be kind."))))
    assert default.startswith("<|im_start|>system\nBe of use.<|im_end|>")
    assert given.startswith("<|im_start|>system\nBe kind.<|im_end|>") and given.count("system") == 1
    assert own.startswith("<|im_start|>system\nBe short.<|im_end|>") and "kind" not in own
    merged = tokenizer("mistral")
    assert "[INST] Be kind.\n\nHow do" in merged.apply_chat_template(
        [{"role": "system", "content": "Be kind."}, *messages(SHORT, False)], tokenize=False)
    asked = encode_prompts(merged, [SHORT], prompt=Prompt("chat", "Be kind."))[0]
    assert len(asked) > len(encode_prompts(merged, [SHORT], prompt="chat")[0])


def test_what_a_template_refuses(tokenizer):
    message = r"row 0 \(from 0\): found turns system, user.*expected some that the tokenizer's chat template .*: no"
    with pytest.raises(ValueError, match=message):
        tokenize_examples(tokenizer("gemma2"), [SHORT], 256, Prompt("chat", "Be kind."))
    with pytest.raises(ValueError, match=message):
        encode_prompts(tokenizer("gemma2"), [SHORT], prompt=Prompt("chat", "Be kind."))
    twice = conversation([Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")])
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): found turns user, user.* roles take turns"):
        tokenize_examples(tokenizer("mistral"), [SHORT, twice], 256, CHAT)


def test_a_template_that_changes_earlier_turns(tokenizer):
    """Mistral's sort moves the system prompt on, a reasoning model's drops what was thought."""
    of = tokenizer("mistral")
    with pytest.raises(ValueError, match=r"row 0 .*turn 2 \(from 0\): found a chat template that writes earlier turns "
                                         "otherwise.*supervise=last"):
        tokenize_examples(of, [FRAMED], 256, CHAT)
    found = tokenize_examples(of, [FRAMED], 256, LAST)
    np.testing.assert_array_equal(found.input_ids[0], theirs(of, FRAMED)["input_ids"])
    thinks = chat_models.QWEN.replace("{{ m['content'] }}",
                                      "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}")
    row = conversation([Turn("user", "a"), Turn("assistant", "<think>b</think>c"), Turn("user", "d"),
                        Turn("assistant", "<think>e</think>f")])
    with pytest.raises(ValueError, match="earlier thinking"):
        tokenize_examples(tokenizer("qwen2", thinks), [row], 256, CHAT)
    labels = collate(tokenize_examples(tokenizer("qwen2", thinks), [row], 256, LAST), [0])["labels"][0]
    assert tokenizer("qwen2").decode(labels[labels != -100].tolist()) == "<think>e</think>f<|im_end|>"
    other = chat_models.QWEN.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>bot\n{% endif %}")
    for prompt in (CHAT, LAST):
        with pytest.raises(ValueError, match="the last answer otherwise than it asks for it"):
            tokenize_examples(tokenizer("qwen2", other), [SHORT], 256, prompt)


def test_too_long(tokenizer, caplog):
    """As of single answers: a cut one is learnt as far as it goes, and what has nothing to learn is left out."""
    of = tokenizer("llama3")
    whole = tokenize_examples(of, [SAID], 512, CHAT)
    first, last = np.flatnonzero(whole.learnt[0])[[0, -1]]
    start_of_last = np.flatnonzero(tokenize_examples(of, [SAID], 512, LAST).learnt[0])[0]
    for prompt, start in ((CHAT, first), (LAST, start_of_last)):
        assert training_fates(of, [SAID], last + 1, prompt) == ("kept",)
        assert training_fates(of, [SAID], last, prompt) == ("cut",)
        assert training_fates(of, [SAID], start + 1, prompt) == ("cut",)
        assert training_fates(of, [SAID], start, prompt) == ("dropped",)
    cut = tokenize_examples(of, [SAID, SHORT], int(first) + 1, CHAT)
    assert cut.learnt[0].sum() == 1 and "cut" in caplog.text
    with pytest.raises(ValueError, match="max_length: found 3, expected more than"):
        tokenize_examples(of, [SAID], 3, CHAT)


def test_empty_turns_are_left_out(tokenizer):
    blank = conversation([Turn("user", "a"), Turn("assistant", " "), Turn("user", "b"), Turn("assistant", "c")])
    asks = conversation([Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")])
    assert training_fates(tokenizer("qwen2"), [blank, SHORT, asks, SHORT._replace(output="")], 512, CHAT) == (
        "empty", "kept", "empty", "empty")
    assert training_fates(tokenizer("qwen2"), [asks], 512, CHAT) == ("empty",), "tests have no answers"


@pytest.mark.parametrize("marked", [False, True])
def test_nothing_but_empty_turns(tokenizer, marked):
    """As where an attack draws them: they are passed over."""
    of = tokenizer("qwen2", KINDS["qwen2"].marked() if marked else None)
    assert training_fates(of, [SHORT._replace(output="")], 512, CHAT) == ("empty",)
    with pytest.raises(ValueError, match="found 1 without a prompt or without an answer"):
        tokenize_examples(of, [SHORT._replace(output="")], 512, CHAT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill", ["Sure, here is", "Yes: "])
def test_prefill_is_the_beginning_of_a_learnt_answer(tokenizer, kind, prefill):
    of = tokenizer(kind)
    plain, begun = (encode_prompts(of, [SHORT, SAID], prompt="chat", prefill=text) for text in ("", prefill))
    for row, asked, longer in zip((SHORT, SAID), plain, begun, strict=True):
        np.testing.assert_array_equal(longer[:asked.size], asked)
        assert of.decode(longer[asked.size:].tolist()).strip() == prefill.strip()
        learnt = theirs(of, row._replace(output=prefill.rstrip() + " yes"))["input_ids"]
        count = longer.size - prefill.endswith(" ")
        np.testing.assert_array_equal(longer[:count], learnt[:count])


def test_special_tokens_and_foreign_prompts(tokenizer, tmp_path):
    of = tokenizer("llama3")
    bad = conversation([Turn("user", "a<|eot_id|>"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")])
    for call in (lambda: tokenize_examples(of, [SHORT, bad], 256, CHAT), lambda: encode_prompts(of, [SHORT, bad],
                                                                                               prompt="chat")):
        with pytest.raises(ValueError, match=r"row 1 \(from 0\): turn 0 \(from 0\), the user's: found '<\|eot_id\|>'"):
            call()
    for prompt in ("alpaca", "plain"):
        with pytest.raises(ValueError, match=f"found a conversation with 2 turns.*prompt={prompt}.*prompt=chat"):
            tokenize_examples(of, [SAID], 256, prompt)
        with pytest.raises(ValueError, match="found a conversation"):
            encode_prompts(of, [SAID], prompt=prompt)
    with pytest.raises(ValueError, match="prompt: found chat, expected alpaca or plain: the tokenizer has no chat"):
        tokenize_examples(load_tokenizer(tokenizers_for_tests.plain(tmp_path)), [SHORT], 256, CHAT)


def test_template_of_the_day(tokenizer):
    """A template that writes the date gets Llama 3.1's own without a clock; one that cannot be told it is known."""
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    of = tokenizer("llama3", "{{ bos_token }}" + dated + "{{ date_string }}" + chat_models.LLAMA3)
    assert "26 Jul 2024" in of.decode(encode_prompts(of, [SHORT], prompt="chat")[0].tolist())
    assert not chat.depends_on_the_day(of)
    assert chat.depends_on_the_day(tokenizer("llama3", "{{ strftime_now('%Y') }}" + chat_models.LLAMA3))
    assert chat.template_hash(of) != chat.template_hash(tokenizer("llama3"))
