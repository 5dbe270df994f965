"""Rows out of a stream of bytes, one by one: JSON Lines, JSON, CSV, TSV and plain text, with errors that name the line.

Not read by the `datasets` library or pandas, whose errors do not say which line is wrong. A reader is a generator of
(path, stream, bad, header): `bad` is told of every row that cannot be read, `header` names the columns of a table
without names. It holds one row at a time, but of a JSON file that is one value.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from jaxvaccine.data.compressed import extension
from jaxvaccine.data.rows import NoRowsError, OnBad, Row, RowError
from jaxvaccine.json_files import decode_utf8

# The names of the columns of a table that has none, given its first cells; None if these are names.
Header = Callable[[Sequence[str]], Sequence[str] | None]
Reader = Callable[[str, IO[bytes], OnBad, Header], Iterator[Row]]
_BOM = b"\xef\xbb\xbf"
_TEXT = re.compile("prompt|instruction|question|goal|sentence|text|input|output|response|answer|completion|target")
_CONVERSATIONS = ("messages", "conversations", "conversation", "chosen", "rejected")
# What pandas calls the column of its row numbers.
_ROW_NUMBERS = re.compile(r"|Unnamed: \d+(\.\d+)*|__index_level_\d+__")


def is_row_number(name: str) -> bool:
    """Whether pandas gave this name to the numbers of its rows."""
    return bool(_ROW_NUMBERS.fullmatch(name))


def named(cells: Sequence[str]) -> None:
    """The `Header` of a table whose first row has the names."""
    del cells


def _lines(path: str, stream: IO[bytes], bad: OnBad, all_of_them: bool = False) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines, with their ends; of those that are not UTF-8 only if `all_of_them`.

    Not splitlines: JSON strings and cells may hold U+2028 and other characters that it takes for line ends."""
    offset = 0
    for number, line in enumerate(stream, 1):
        body = line.removeprefix(_BOM) if number == 1 else line
        try:
            text = body.decode()
        except UnicodeDecodeError as e:
            at = len(line) - len(body) + e.start
            bad(RowError(f"{path}, line {number}: found byte 0x{line[at]:02x} at offset {offset + at}, expected UTF-8",
                         "not UTF-8"))
            if all_of_them:
                yield number, body.decode(errors="replace")
        else:
            yield number, text
        offset += len(line)


def _filled(path: str, stream: IO[bytes], bad: OnBad) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in _lines(path, stream, bad) if line.strip())


def _empty(path: str) -> ValueError:
    return ValueError(f"{path}: found an empty file, expected rows")


def _no_rows(path: str, first: RowError | None) -> ValueError:
    """Why a file gave no row: it is empty, or none of it can be read, of which `first` tells."""
    return NoRowsError(f"{path}: found no row that can be read; the first: {first}") if first else _empty(path)


class _Told:
    """An `OnBad` that remembers the first error of another."""

    def __init__(self, bad: OnBad):
        self.bad, self.first = bad, None

    def __call__(self, error: RowError) -> None:
        self.first = self.first or error
        self.bad(error)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of names that differ: of two alike, JSON's reader would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return found


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_distinct)


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise RowError(f"{where}: found {type(value).__name__} {value!r:.60}, expected a JSON object", "no JSON object")
    return Row(value, where)


def read_json_family(path: str, stream: IO[bytes], bad: OnBad, header: Header = named) -> Iterator[Row]:
    """One object a line; or one JSON value, as of `_of_value`: whichever it is, under .json, .jsonl and .ndjson."""
    del header
    kept, bad = _Kept(stream), _Told(bad)
    lines = _filled(path, kept, bad)
    first = next(lines, None)
    if first is None:
        raise _no_rows(path, bad.first)
    number, line = first
    of_lines = extension(path) != ".json"
    value = None
    if not line.lstrip().startswith("[") and not (of_lines and line.strip() == "{"):
        try:
            value = _parse(line)
        except (ValueError, RecursionError):
            if of_lines:
                yield from _json_lines(path, [first], lines, bad)
                return
        else:
            second = next(lines, None)
            if second is None and not (of_lines and not isinstance(value, dict)):
                yield from _of_value(path, value, f"{path}, line {number}", bad)
            else:
                kept.forget()
                yield from _json_lines(path, [first, *([second] if second else [])], lines, bad)
            return
    yield from _one_value(path, kept.rest(), number, bad)


class _Kept:
    """A stream's lines, which are remembered until it is known that they are rows."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.lines = stream, []

    def __iter__(self) -> Iterator[bytes]:
        for line in self.stream:
            if self.lines is not None:
                self.lines.append(line)
            yield line

    def forget(self) -> None:
        self.lines = None

    def rest(self) -> bytes:
        """All that was read, and all that was not."""
        return b"".join(self.lines) + self.stream.read()


def _json_lines(path: str, first: Sequence[tuple[int, str]], lines: Iterator[tuple[int, str]], bad: OnBad
                ) -> Iterator[Row]:
    def rows() -> Iterator[tuple[int, str]]:
        yield from first
        yield from lines

    for number, line in rows():
        where = f"{path}, line {number}"
        try:
            value = _parse(line)
        except (ValueError, RecursionError) as e:  # ValueError: also an integer of thousands of digits
            bad(RowError(f"{where}: found malformed JSON ({e}), expected one JSON object per line", "malformed JSON"))
            continue
        try:
            row = _object(value, where)
        except RowError as e:
            bad(e)
            continue
        yield row


def _one_value(path: str, data: bytes, line: int, bad: OnBad) -> Iterator[Row]:
    text = decode_utf8(data, path)
    try:
        value = _parse(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {e.lineno}: found malformed JSON ({e}), expected a list of objects") from e
    except (ValueError, RecursionError) as e:  # a name twice, an integer of thousands of digits, too deeply nested
        raise ValueError(f"{path}, line {line}: found malformed JSON ({e}), expected a list of objects") from e
    yield from _of_value(path, value, path, bad)


def _of_value(path: str, value: Any, place: str, bad: OnBad) -> Iterator[Row]:
    """The rows of one JSON value: a list of objects; an object that holds one, {"data": [...]}; columns, {"prompt":
    [...], "response": [...]}, or as pandas writes them, {"prompt": {"0": ...}}; one row."""
    if isinstance(value, dict):
        columns = {name: _numbered(of) for name, of in value.items()}
        lists = {name: of for name, of in columns.items() if isinstance(of, list)}
        data = [name for name, of in lists.items() if all(isinstance(e, dict) for e in of) and not _turns(of)]
        is_row = any(_is_conversation(name, of) or (isinstance(of, str) and _TEXT.fullmatch(name.strip().lower()))
                     for name, of in value.items())
        if is_row or not lists or any(_turns(of) for of in lists.values()):
            yield Row(value, place)
            return
        if len(lists) == len(value) and len(data) < len(lists):
            yield from _of_columns(path, lists)
            return
        if not data:
            yield Row(value, place)
            return
        if len(data) > 1:
            raise ValueError(f"{path}: found an object with {len(data)} lists of objects (keys: {', '.join(value)}), "
                             "expected a list of objects, or an object that holds exactly one")
        value = lists[data[0]]
    if not isinstance(value, list):
        raise ValueError(f"{path}: found {type(value).__name__} {value!r:.60}, expected a list of objects")
    for i, row in enumerate(value):
        try:
            found = _object(row, f"{path}, row {i} (from 0)")
        except RowError as e:
            bad(e)
        else:
            yield found


def _is_conversation(name: str, value: Any) -> bool:
    """Whether it is one row's conversation, or meant to be one; a column of them is a list of lists."""
    return name in _CONVERSATIONS and isinstance(value, list) and not (value and isinstance(value[0], list))


def _numbered(value: Any) -> Any:
    """The list of {"0": …, "1": …}, as pandas writes a column; another value as it is."""
    if isinstance(value, dict) and value and all(name == str(i) for i, name in enumerate(value)):
        return list(value.values())
    return value


def _turns(values: Any) -> bool:
    """Whether they are the turns of a conversation: those belong to one row."""
    return isinstance(values, list) and bool(values) and all(
        isinstance(of, dict) and ("role" in of or {"from", "value"} <= set(of)) for of in values)


def _of_columns(path: str, columns: dict[str, list[Any]]) -> Iterator[Row]:
    lengths = {name: len(of) for name, of in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: found columns of different lengths ("
                         + ", ".join(f"{name}: {n}" for name, n in lengths.items()) + "), expected one length")
    for i, values in enumerate(zip(*columns.values(), strict=True)):
        yield Row(dict(zip(columns, values, strict=True)), f"{path}, row {i} (from 0)")


def _table(path: str, records: Iterator[tuple[int, list[str]]], bad: OnBad, header: Header) -> Iterator[Row]:
    """Rows from (line, cells); the first are the column names, unless `header` knows better."""
    first, cells = next(records, (1, [""]))
    if given := header(cells):
        names, numbers = list(given), 0
        rows: Iterator[tuple[int, list[str]]] = _with(first, cells, records)
    else:
        names, rows = [cell.strip() for cell in cells], records
        # pandas writes the numbers of its rows before the columns, under no name or one that it made up.
        numbers = next((i for i, name in enumerate(names) if not is_row_number(name)), 0)
        if len(set(names[numbers:])) < len(names[numbers:]) or "" in names[numbers:]:
            raise ValueError(
                f"{path}, line {first}: found columns {names}, expected distinct names that are not empty")
    for line, cells in rows:
        if len(cells) != len(names):
            bad(RowError(f"{path}, line {line}: found {len(cells)} cells, expected {len(names)} ({', '.join(names)})",
                         "another number of cells"))
            continue
        yield Row(dict(zip(names[numbers:], cells[numbers:], strict=True)), f"{path}, line {line}")


def _with(line: int, cells: list[str], records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    yield line, cells
    yield from records


def _csv_records(path: str, stream: IO[bytes], bad: OnBad) -> Iterator[tuple[int, list[str]]]:
    # A cell of text may be as long as it likes; the module's limit, for all readers, is 131072 characters.
    csv.field_size_limit(2**31 - 1)
    broken: list[RowError] = []  # of the row that is being read

    def lines() -> Iterator[str]:
        # What is not UTF-8 is still a line of its row, and may open or close a quoted cell.
        for _, text in _lines(path, stream, broken.append, all_of_them=True):
            # Lines keep their ends: they belong to quoted cells. A bare CR outside quotes is an error of the module.
            yield text if text.endswith("\n") else text + "\n"

    reader, line, seen = csv.reader(lines(), strict=True), 1, False
    while True:
        error = None
        try:
            cells = next(reader, None)
        except csv.Error as e:
            error = RowError(f"{path}, line {reader.line_num}: found malformed CSV ({e}) in the row that begins on "
                             f"line {line}", "malformed CSV")
            if "unexpected end" in str(e) and not broken:
                raise error from e  # the quote may have opened anywhere before: what it took in cannot be told
            cells = []
        if broken:
            error = broken[0]
            broken.clear()
        if error:
            if not seen:
                raise error  # a header that cannot be read: the next row would be taken for it
            bad(error)
        elif cells is None:
            break
        elif len(cells) > 1 or (cells and cells[0].strip()):
            seen = True
            # CRLF inside a quoted cell is the file's line end, not the text's.
            yield line, [cell.replace("\r\n", "\n") for cell in cells]
        line = reader.line_num + 1
    if not seen:
        raise _empty(path)


def read_csv(path: str, stream: IO[bytes], bad: OnBad, header: Header = named) -> Iterator[Row]:
    """RFC 4180, so that quoted cells may span lines; the first row has the names."""
    return _table(path, _csv_records(path, stream, bad), bad, header)


def read_tsv(path: str, stream: IO[bytes], bad: OnBad, header: Header = named) -> Iterator[Row]:
    """Cells between tabs; quotes are text, as in GLUE's files."""
    def records() -> Iterator[tuple[int, list[str]]]:
        number = 0

        def behind_header(error: RowError) -> None:
            if not number:
                raise error  # the next row would be taken for the header
            bad(error)

        for number, line in _filled(path, stream, behind_header):
            yield number, line.removesuffix("\n").removesuffix("\r").split("\t")
        if not number:
            raise _empty(path)

    return _table(path, records(), bad, header)


def read_text(path: str, stream: IO[bytes], bad: OnBad, header: Header = named) -> Iterator[Row]:
    """A text a line, in the column `text`; blank lines are skipped."""
    del header
    number, bad = 0, _Told(bad)
    for number, line in _filled(path, stream, bad):
        yield Row({"text": line.removesuffix("\n").removesuffix("\r")}, f"{path}, line {number}")
    if not number:
        raise _no_rows(path, bad.first)


READERS: dict[str, Reader] = {".jsonl": read_json_family, ".ndjson": read_json_family, ".json": read_json_family,
                              ".csv": read_csv, ".tsv": read_tsv, ".txt": read_text}
