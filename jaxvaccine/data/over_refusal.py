"""Benchmarks of over-refusal: prompts that look harmful and are not, by the authors' own files.

XSTest (arXiv 2308.01263): columns prompt, type, label (safe or unsafe); its first file has no label, and the types of
its unsafe prompts begin with "contrast". OR-Bench (arXiv 2405.20947): columns prompt, category; which file it is tells
whether its prompts are harmless (or-bench-80k, or-bench-hard-1k) or not (or-bench-toxic).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.prompts import Example
from jaxvaccine.data.rows import text, where


def _is_safe(row: Mapping[str, Any], index: int) -> bool:
    if "label" not in row:
        return not text(row, index, "type").startswith("contrast")
    label = text(row, index, "label").strip().lower()
    if label not in ("safe", "unsafe"):
        raise ValueError(f"{where(row, index)}: column 'label': found {label!r:.80}, expected 'safe' or 'unsafe'")
    return label == "safe"


def _xstest(rows: Sequence[Mapping[str, Any]], safe: bool) -> list[Example]:
    return [Example(text(row, i, "prompt")) for i, row in enumerate(rows) if _is_safe(row, i) == safe]


def xstest_safe(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """XSTest's safe prompts, without answers: of these refusals are counted.

    Raises:
      ValueError: a column is missing, no text, or another label than safe and unsafe.
    """
    return _xstest(rows, True)


def xstest_unsafe(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """XSTest's unsafe prompts, without answers, the contrast to the safe ones; raises as `xstest_safe`."""
    return _xstest(rows, False)


def or_bench(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The prompts of one of OR-Bench's files, without answers.

    Raises:
      ValueError: a column is missing or no text.
    """
    return [Example(text(row, i, "prompt")) for i, row in enumerate(rows)]


def _named(column: str, row: Mapping[str, Any]) -> Mapping[str, bool]:
    found = row.get(column)
    return {found.strip(): True} if isinstance(found, str) and found.strip() else {}


def type_of(row: Mapping[str, Any]) -> Mapping[str, bool]:
    """XSTest's type, {name: True}."""
    return _named("type", row)


def category_of(row: Mapping[str, Any]) -> Mapping[str, bool]:
    """OR-Bench's category, {name: True}."""
    return _named("category", row)
