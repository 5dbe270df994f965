"""Plain texts, a line or a row each: prompts without an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.prompts import Example
from jaxvaccine.data.rows import text

COLUMNS = ("text", "prompt", "instruction", "question", "goal")


def prompts(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The first column there is of COLUMNS, such as a text file's lines, each a prompt: what a model is tested with.

    Raises:
      ValueError: a column is missing or no text.
    """
    return [Example(text(row, i, *COLUMNS)) for i, row in enumerate(rows)]
