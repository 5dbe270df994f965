"""Preference pairs: a prompt with the answer that was chosen and the one that was rejected, as texts or as messages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.messages import COLUMNS as CONVERSATIONS
from jaxvaccine.data.messages import said, turns
from jaxvaccine.data.prompts import Example, Turn
from jaxvaccine.data.rows import RowError, column, text, where

CHOSEN, REJECTED = "chosen", "rejected"
PROMPTS = ("prompt", "instruction", "question", *CONVERSATIONS)
# How HH-RLHF (Anthropic/hh-rlhf) writes a conversation as one text.
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


def preferences(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The prompts with the answers that were chosen.

    The prompt is the first column there is of PROMPTS, a text or messages; without any, both answers are whole
    conversations, as messages or in HH-RLHF's form, "\\n\\nHuman: …\\n\\nAssistant: …".

    Raises:
      ValueError: the columns chosen and rejected are not there, or hold neither texts nor messages; an answer is not
        the assistant's; or there is no prompt.
    """
    return [preference(row, i, CHOSEN) for i, row in enumerate(rows)]


def preferences_rejected(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The prompts with the answers that were rejected; otherwise as `preferences`."""
    return [preference(row, i, REJECTED) for i, row in enumerate(rows)]


def is_pair(row: Mapping[str, Any]) -> bool:
    return CHOSEN in row and REJECTED in row


def preference(row: Mapping[str, Any], index: int, which: str) -> Example:
    """A row's prompt with one of its answers; errors as of `preferences`."""
    for name in (CHOSEN, REJECTED):
        column(row, index, (name,))
    _ = row[CHOSEN], row[REJECTED]  # both have been read: the other answer is left out on purpose
    value, place = row[which], f"{where(row, index)}: column {which!r}"
    prompt = next((name for name in PROMPTS if name in row), None)
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        answer = text(row, index, which)
        if prompt is None:
            if not _SPEAKER.match(answer):
                raise RowError(f"{where(row, index)}: missing column {' or '.join(map(repr, PROMPTS[:3]))}, found "
                               f"columns: {', '.join(row)}, expected one, or answers that are whole conversations",
                               "missing column 'prompt'")
            return _answered(said(_spoken(answer), place), place)
        if isinstance(row[prompt], str) and prompt not in CONVERSATIONS:
            input = text(row, index, "input") if row.get("input") is not None else ""
            return Example(text(row, index, prompt), input, answer)
        return said([*_asked(row, index, prompt), Turn("assistant", answer)], place)
    answers = turns([value] if isinstance(value, Mapping) else value, place)
    if all(turn.role == "assistant" for turn in answers):
        if prompt is None:
            column(row, index, PROMPTS[:3])
        answers = [*_asked(row, index, prompt), *answers]
    return _answered(said(answers, place), place)


def _asked(row: Mapping[str, Any], index: int, name: str) -> list[Turn]:
    """The turns of a prompt."""
    if isinstance(row[name], str) and name not in CONVERSATIONS:
        return [Turn("user", text(row, index, name))]
    return turns(row[name], f"{where(row, index)}: column {name!r}")


def _spoken(value: str) -> list[Turn]:
    _, *parts = _SPEAKER.split(value)
    return [Turn("user" if who == "Human" else "assistant", what.strip())
            for who, what in zip(parts[::2], parts[1::2], strict=True)]


def _answered(example: Example, place: str) -> Example:
    if not example.output:
        raise RowError(f"{place}: found a conversation that ends with the user, expected an answer", "no answer")
    return example
