"""Reading typed columns out of a data set's rows, with errors that say where the row came from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


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
    raise ValueError(f"{where(row, index)}: missing column {' or '.join(map(repr, names))}; found columns: {found}")


def text(row: Mapping[str, Any], index: int, *names: str) -> str:
    """The text in the first of `names` that the row has.

    Raises:
      ValueError: none of the columns is there, the value is not text, or no UTF-8 can be made of it.
    """
    name = column(row, index, names)
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(
            f"{where(row, index)}: column {name!r}: found {value!r:.80} ({type(value).__name__}), expected text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as e:
        # JSON can spell half a character ("\ud83d"); tokenizers fail on it much later, without a line number.
        raise ValueError(
            f"{where(row, index)}: column {name!r}: found an unpaired surrogate U+{ord(value[e.start]):04X} "
            f"at character {e.start}, expected valid Unicode"
        ) from e
    return value
