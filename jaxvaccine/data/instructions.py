"""Instruction files: Alpaca, Dolly, GSM8K, AlpacaEval's references and the like; and by their columns preference pairs
and conversations."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.messages import COLUMNS as CONVERSATIONS
from jaxvaccine.data.messages import conversation_of
from jaxvaccine.data.preferences import CHOSEN, is_pair, preference
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.rows import RowError, text, where

INSTRUCTION_COLUMNS = ("instruction", "prompt", "question")
INPUT_COLUMNS = ("input", "context")  # Alpaca's, Dolly's
OUTPUT_COLUMNS = ("output", "response", "answer", "completion")


def instructions(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The first column there is of INSTRUCTION_COLUMNS and of OUTPUT_COLUMNS, and the one of INPUT_COLUMNS that is not
    empty. Rows without such a pair are read as `preferences` or `messages`, if they have their columns.

    Raises:
      ValueError: a column is missing or no text, or `input` and `context` both hold text.
    """
    return [_example(row, i) for i, row in enumerate(rows)]


def _example(row: Mapping[str, Any], index: int) -> Example:
    if not all(any(name in row for name in names) for names in (INSTRUCTION_COLUMNS, OUTPUT_COLUMNS)):
        if is_pair(row):
            return preference(row, index, CHOSEN)
        if any(name in row for name in CONVERSATIONS):
            return conversation_of(row, index)
        if "text" in row and len(row) == 1:
            raise RowError(f"{where(row, index)}: found column 'text' alone, expected a prompt and an answer; kind "
                           "'prompts' reads texts as prompts without an answer", "column 'text' alone")
    return Example(text(row, index, *INSTRUCTION_COLUMNS), _input(row, index), text(row, index, *OUTPUT_COLUMNS))


def _input(row: Mapping[str, Any], index: int) -> str:
    # Tables that mix rows with and without an input have null in it.
    found = {name: text(row, index, name) for name in INPUT_COLUMNS if row.get(name) is not None}
    filled = [name for name, value in found.items() if value.strip()]
    if len(filled) > 1:
        raise ValueError(f"{where(row, index)}: columns 'input' and 'context': found text in both, expected it in one: "
                         "a prompt has one input")
    return found[filled[0]] if filled else ""
