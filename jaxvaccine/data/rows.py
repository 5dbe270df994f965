"""Reading typed columns out of a data set's rows, with errors that say where the row came from."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

# What becomes of a row that cannot be read: it ends everything, or is left out and counted.
BadRows = Literal["error", "skip"]


class RowError(ValueError):
    """A row that cannot be read. `reason` is the sort of mistake, by which such rows are counted."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class NoRowsError(ValueError):
    """A file or data set without a row that can be read."""


# Told of every bad row: raises its error, or counts it.
OnBad = Callable[[RowError], None]


def raise_it(error: RowError) -> None:
    """The `OnBad` that takes no bad row."""
    raise error


def reason_of(error: ValueError, where: str) -> str:
    """The sort of mistake in an error about a row: what it says before the value that was found."""
    if isinstance(error, RowError):
        return error.reason
    said = str(error).removeprefix(where).lstrip(":, ")
    return re.split(r"[:,]? found ", said, maxsplit=1)[0][:80]


class Row(dict):
    """A row that knows its place in a file or data set ("train.jsonl, line 7"); otherwise a plain dict."""

    __slots__ = ("where",)

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self.where = where


class Watched(Mapping):
    """A row that knows which of its columns have been read: `read`."""

    __slots__ = ("read", "row", "where")

    def __init__(self, row: Mapping[str, Any], index: int):
        self.row, self.where, self.read = row, where(row, index), set()

    def __getitem__(self, name: str) -> Any:
        value = self.row[name]
        self.read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.row

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)

    def unread(self) -> dict[str, Any]:
        """The columns that hold something and have not been read."""
        return {name: value for name, value in self.row.items() if name not in self.read and not _is_nothing(value)}


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {}, ())


def where(row: Mapping[str, Any], index: int) -> str:
    """The row's place; for a plain dict its index in the list that it came in."""
    return getattr(row, "where", f"row {index} (from 0)")


def column(row: Mapping[str, Any], index: int, names: Sequence[str]) -> str:
    """The first of `names` that the row has; ValueError with the columns found if it has none."""
    for name in names:
        if name in row:
            return name
    found = ", ".join(map(str, row)) or "none"
    missing = f"missing column {' or '.join(map(repr, names))}"
    raise RowError(f"{where(row, index)}: {missing}; found columns: {found}", missing)


def text(row: Mapping[str, Any], index: int, *names: str) -> str:
    """The text in the first of `names` that the row has.

    Raises:
      ValueError: none of the columns is there, the value is not text, or no UTF-8 can be made of it.
    """
    name = column(row, index, names)
    value = row[name]
    if not isinstance(value, str):
        raise RowError(
            f"{where(row, index)}: column {name!r}: found {value!r:.80} ({type(value).__name__}), expected text",
            f"column {name!r}: no text")
    return valid_unicode(value, f"{where(row, index)}: column {name!r}")


def valid_unicode(value: str, place: str) -> str:
    """The text; RowError if no UTF-8 can be made of it."""
    try:
        value.encode()
    except UnicodeEncodeError as e:
        # JSON can spell half a character ("\ud83d"); tokenizers fail on it much later, without a line number.
        raise RowError(f"{place}: found an unpaired surrogate U+{ord(value[e.start]):04X} at character {e.start}, "
                       "expected valid Unicode", "an unpaired surrogate") from e
    return value
