"""What a text of an example may not hold: nothing at all, the template that is put around it, a special token."""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxvaccine.data.accounts import place
from jaxvaccine.data.prompts import Example, Prompt, PromptForm, as_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPT, ALL = (0, 1), (0, 1, 2)  # which texts of an example
# Which of them may not hold the template, by the form of the prompt. What follows one in an answer is cut off when the
# answer is read (evaluation/answers.py), but for chats: their answers end as their model was taught.
_WITHOUT_TEMPLATE: dict[PromptForm, tuple[int, ...]] = {"alpaca": ALL, "plain": (2,), "chat": ()}
# Headings and preamble of prompts.py, as others write them too. What any such text has stands first: a search for it
# is fast.
_ALWAYS = ("###", "elow is an instruction")
_TEMPLATE = re.compile(r"###\s*(instruction|response)\s*:|below is an instruction that describes a task", re.IGNORECASE)
# Control tokens that a tokenizer does not call special, such as DeepSeek's <｜User｜>; not <think>, which is text.
_CONTROL = re.compile(r"<[|｜].+[|｜]>")


def is_blank(text: str) -> bool:
    """Whether nothing of it can be seen: it is empty, white space, or of characters such as a zero-width space."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def has_prompt(example: Example) -> bool:
    """Whether there is something to answer, and no earlier turn of nothing."""
    blank = is_blank(example.instruction) and is_blank(example.input)
    return not blank and not any(turn.role != "system" and is_blank(turn.text) for turn in example.history)


def _texts(example: Example, fields: Collection[int]) -> Iterator[tuple[int, str]]:
    """(field, text), as `accounts.place` takes the field; with the prompt's own also those of its history."""
    yield from ((field, example[field]) for field in fields)
    if example.history and 0 in fields:
        yield from ((k - len(example.history), turn.text) for k, turn in enumerate(example.history))


def check_form(examples: Sequence[Example], prompt: Prompt | PromptForm) -> None:
    """Raises ValueError for the first conversation, if the prompt has no room for its history."""
    form = as_prompt(prompt).form
    for i, example in enumerate(examples):
        if example.history and form != "chat":
            raise ValueError(f"{place(example, i)}: found a conversation with {len(example.history)} turns before its "
                             f"question, expected one question alone with prompt={form}; prompt=chat takes it")


def check_template(examples: Sequence[Example], fields: Collection[int] = PROMPT) -> None:
    """Raises ValueError for the first text that holds Alpaca's template already: it would be put around it again."""
    for i, example in enumerate(examples):
        for field, text in _texts(example, fields):
            if any(part in text for part in _ALWAYS) and (found := _TEMPLATE.search(text)):
                raise ValueError(
                    f"{place(example, i, field)}: found {found[0]!r} of the prompt's template at character "
                    f"{found.start()}, expected text without it: it is put around every prompt")


def control_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """What is not taken for text where a text spells it, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()
             if token.special or _CONTROL.fullmatch(token.content)}
    # A model may pad with "!": text all the same.
    return sorted((token for token in {*added, *tokenizer.all_special_tokens} if len(token) > 1),
                  key=lambda token: (-len(token), token))


def check_special_tokens(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example],
                         fields: Collection[int] = PROMPT) -> None:
    """Raises ValueError for the first text that spells a special token: it would be taken as that, not as text."""
    tokens = control_tokens(tokenizer)
    if not tokens:
        return
    pattern = re.compile("|".join(map(re.escape, tokens)))
    for i, example in enumerate(examples):
        for field, text in _texts(example, fields):
            if found := pattern.search(text):
                raise ValueError(
                    f"{place(example, i, field)}: found {found[0]!r}, a special token of the tokenizer, at character "
                    f"{found.start()}, expected text without it: it would not be read as text")


def check_prompts(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example],
                  prompt: Prompt | PromptForm = "alpaca") -> None:
    """Raises ValueError for the first prompt that is empty, holds the template that would be put around it, spells a
    special token, or is a conversation where the prompt takes none."""
    check_form(examples, prompt)
    for i, example in enumerate(examples):
        if not has_prompt(example):
            raise ValueError(f"{place(example, i, 0)}: found an empty prompt, expected text")
    check_template(examples, [field for field in _WITHOUT_TEMPLATE[as_prompt(prompt).form] if field in PROMPT])
    check_special_tokens(tokenizer, examples)


def check_prefill(tokenizer: "PreTrainedTokenizerFast", prefill: str, prompt: Prompt | PromptForm = "alpaca") -> None:
    """Raises ValueError for a text that no answer can be made to begin with: it is blank, spells a special token, or
    holds the template, at which an answer ends unless it is a chat's."""
    if is_blank(prefill):
        raise ValueError(f"prefill: found {prefill!r}, expected text")
    begins = [Example(output=prefill, instruction="")]
    try:
        check_template(begins, [field for field in _WITHOUT_TEMPLATE[as_prompt(prompt).form] if field not in PROMPT])
        check_special_tokens(tokenizer, begins, (2,))
    except ValueError as error:
        raise ValueError(str(error).replace(place(begins[0], 0, 2), "prefill", 1)) from error


def check_training_texts(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example],
                         prompt: Prompt | PromptForm = "alpaca") -> None:
    """Raises ValueError for the first prompt or answer that holds the template, or spells a special token, and for a
    conversation where the prompt takes none. An answer may spell EOS out at its end, and a prompt that is plain or a
    chat's may hold the template, which is not put around it."""
    check_form(examples, prompt)
    check_template(examples, _WITHOUT_TEMPLATE[as_prompt(prompt).form])
    check_special_tokens(tokenizer, [
        e._replace(output=without_eos(e.output, tokenizer.eos_token)) if tokenizer.eos_token in e.output else e
        for e in examples], ALL)


def without_eos(text: str, eos: str) -> str:
    """The text without the EOS tokens that it ends with, and what white space follows them."""
    while (stripped := text.rstrip()).endswith(eos):
        text = stripped.removesuffix(eos)
    return text
