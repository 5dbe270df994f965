"""AG News: columns text, label (0 to 3, or the label's name), as fancyzhx/ag_news has them; or the original's three,
class (1 to 4), title and description, under these names or without any."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.prompts import Example, classification
from jaxvaccine.data.rows import column, text, where

LABELS = ("World", "Sports", "Business", "Sci/Tech")
# T-Vaccine's ag_news/build_dataset.py and Booster's agnews/pred_eval.py, word for word.
INSTRUCTION = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n" + "\n".join(LABELS) + "\n")
_BY_NAME = {str(i): label for i, label in enumerate(LABELS)} | {label.casefold(): label for label in LABELS}
_BY_CLASS = {str(i): label for i, label in enumerate(LABELS, 1)}
# The original's columns, which its train.csv does not name; Kaggle's copy does.
_CLASS, _TITLE, _DESCRIPTION = "Class Index", "Title", "Description"


def agnews_header(cells: Sequence[str]) -> tuple[str, ...] | None:
    """The names of the original's three columns, if these are its first row's cells."""
    return (_CLASS, _TITLE, _DESCRIPTION) if len(cells) == 3 and cells[0] in _BY_CLASS else None


def _found(row: Mapping[str, Any], index: int, name: str, labels: Mapping[str, str], expected: str) -> str:
    value = row[column(row, index, (name,))]
    # True and 1.0 are not labels, whatever int() would make of them: str() spells them otherwise.
    label = labels.get(str(value).strip().casefold()) if isinstance(value, int | str) else None
    if label is None:
        raise ValueError(f"{where(row, index)}: column {name!r}: found label {value!r:.80}, expected {expected}"
                         + ", ".join(map(repr, LABELS)))
    return label


def _example(row: Mapping[str, Any], index: int) -> Example:
    if _CLASS in row:
        label = _found(row, index, _CLASS, _BY_CLASS, "1 to 4, for ")
        return classification(INSTRUCTION, f"{text(row, index, _TITLE)} {text(row, index, _DESCRIPTION)}", label)
    label = _found(row, index, "label", _BY_NAME, "0 to 3 or one of ")
    return classification(INSTRUCTION, text(row, index, "text"), label)


def agnews(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """News articles to sort into four categories, as in the papers' experiments; the answer is the label's name.

    Of the original's columns, the text is title and description with a space between, as in fancyzhx/ag_news.
    """
    return [_example(row, i) for i, row in enumerate(rows)]
