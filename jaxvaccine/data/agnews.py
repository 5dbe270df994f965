"""AG News (fancyzhx/ag_news): columns text, label (0 to 3, or the label's name)."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.prompts import Example, classification
from jaxvaccine.data.rows import column, text, where

LABELS = ("World", "Sports", "Business", "Sci/Tech")
# T-Vaccine's ag_news/build_dataset.py and Booster's agnews/pred_eval.py, word for word.
INSTRUCTION = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n" + "\n".join(LABELS) + "\n")
_BY_NAME = {str(i): label for i, label in enumerate(LABELS)} | {label.casefold(): label for label in LABELS}


def _label(row: Mapping[str, Any], index: int) -> str:
    value = row[column(row, index, ("label",))]
    # True and 1.0 are not labels, whatever int() would make of them: str() spells them otherwise.
    label = _BY_NAME.get(str(value).strip().casefold()) if isinstance(value, int | str) else None
    if label is None:
        raise ValueError(f"{where(row, index)}: column 'label': found label {value!r:.80}, expected 0 to 3 or one of "
                         + ", ".join(map(repr, LABELS)))
    return label


def agnews(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """News articles to sort into four categories, as in the papers' experiments; the answer is the label's name."""
    return [classification(INSTRUCTION, text(row, i, "text"), _label(row, i)) for i, row in enumerate(rows)]
