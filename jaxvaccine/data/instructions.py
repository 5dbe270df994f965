"""Plain instruction files: Alpaca, Dolly, GSM8K, AlpacaEval's references and the like."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.prompts import Example
from jaxvaccine.data.rows import text, where

INSTRUCTION_COLUMNS = ("instruction", "prompt", "question")
INPUT_COLUMNS = ("input", "context")  # Alpaca's, Dolly's
OUTPUT_COLUMNS = ("output", "response", "answer", "completion")


def instructions(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The first column there is of INSTRUCTION_COLUMNS and of OUTPUT_COLUMNS, and the one of INPUT_COLUMNS that is not
    empty.

    Raises:
      ValueError: a column is missing or no text, or `input` and `context` both hold text.
    """
    return [Example(text(row, i, *INSTRUCTION_COLUMNS), _input(row, i), text(row, i, *OUTPUT_COLUMNS))
            for i, row in enumerate(rows)]


def _input(row: Mapping[str, Any], index: int) -> str:
    # Tables that mix rows with and without an input have null in it.
    found = {name: text(row, index, name) for name in INPUT_COLUMNS if row.get(name) is not None}
    filled = [name for name, value in found.items() if value.strip()]
    if len(filled) > 1:
        raise ValueError(f"{where(row, index)}: columns 'input' and 'context': found text in both, expected it in one: "
                         "a prompt has one input")
    return found[filled[0]] if filled else ""
