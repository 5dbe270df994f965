"""SST-2 (Stanford Sentiment Treebank, GLUE): columns sentence (or text), label (0/1 or negative/positive)."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.prompts import Example, classification
from jaxvaccine.data.rows import column, text, where

# Booster's sst2/build_dataset.py, word for word.
INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
_LABELS = {"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"}


def _label(row: Mapping[str, Any], index: int) -> str:
    name = column(row, index, ("label",))
    value = row[name]
    # TSV has only text; True and 1.0 are not labels of SST-2, whatever int() would make of them.
    label = _LABELS.get(str(value).strip().lower()) if isinstance(value, int | str) else None
    if label is None:
        raise ValueError(
            f"{where(row, index)}: column {name!r}: found label {value!r:.80}, expected 0, 1, 'negative' or 'positive'"
        )
    return label


def sst2(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Sentences to classify, as in Booster's experiments; the answer is "negative" or "positive"."""
    return [classification(INSTRUCTION, text(row, i, "sentence", "text"), _label(row, i)) for i, row in enumerate(rows)]
