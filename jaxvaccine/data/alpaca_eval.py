"""AlpacaEval (github.com/tatsu-lab/alpaca_eval): columns instruction, output, generator, dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.prompts import Example
from jaxvaccine.data.rows import text, where


def alpaca_eval(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Instructions with the outputs of one reference model, such as text_davinci_003's or gpt4_turbo's.

    The files hold the same instructions for every model; `generator`, where it is there, says whose outputs these are.

    Raises:
      ValueError: a column is missing or no text, an output is empty, or the outputs are those of several models.
    """
    generator = rows[0].get("generator") if rows else None
    examples = []
    for i, row in enumerate(rows):
        if row.get("generator") != generator:
            raise ValueError(f"{where(row, i)}: column 'generator': found {row.get('generator')!r}, expected "
                             f"{generator!r} as in the first row: a win rate is against one model")
        output = text(row, i, "output").strip()
        if not output:
            raise ValueError(f"{where(row, i)}: column 'output': found no text, expected a reference to win against")
        examples.append(Example(text(row, i, "instruction").strip(), "", output))
    return examples
