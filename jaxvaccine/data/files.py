"""Rows from files (JSONL, JSON, CSV, TSV, Parquet) and from the Hugging Face hub, with errors that name the line.

fsspec opens what lies elsewhere than on this machine. The text formats are read here and not by the `datasets` library,
whose errors do not say which line is wrong.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from jaxvaccine.data.rows import Row
from jaxvaccine.json_files import decode_utf8


def _is_url(name: str) -> bool:
    return "://" in name


def open_file(path_or_url: str | os.PathLike) -> IO[bytes]:
    """A file, opened to be read as bytes: one of this machine, or what a URL means to fsspec, fetched whole.

    Args:
      path_or_url: a path; or a URL such as s3://bucket/train.jsonl, hf://datasets/owner/name/train.jsonl or
        zip://train.jsonl::s3://bucket/all.zip, whose backend (s3fs, …) is installed.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the URL's protocol is unknown or its backend is not installed, or the file cannot be fetched.
    """
    name = os.fspath(path_or_url)
    if not _is_url(name):
        return open(Path(name).expanduser(), "rb")
    import fsspec

    try:
        file_system, path = fsspec.url_to_fs(name)
        return io.BytesIO(file_system.cat_file(path))
    except (FileNotFoundError, IsADirectoryError) as e:
        raise FileNotFoundError(f"{name}: found no such file") from e
    except Exception as e:  # each backend raises its own types
        raise ValueError(f"{name}: found no file that can be read, expected a URL that fsspec opens "
                         f"({type(e).__name__}: {e})") from e


def file_sha256(path_or_url: str | os.PathLike) -> str:
    """SHA-256 of the file's bytes, hexadecimal: what a run's config.json records of its data."""
    with open_file(path_or_url) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_rows(path_or_hub_id: str | os.PathLike, split: str | None = None) -> list[dict[str, Any]]:
    """All rows of a file, by its extension, or of a data set on the Hugging Face hub.

    A file is a path, or a URL as of `open_file`.


    - .jsonl: one object per line; blank lines are skipped.
    - .json: a list of objects, an object that holds one list of them ({"data": [...]}), or JSONL under this name.
    - .csv: RFC 4180 with a header, so that quoted cells may span lines.
    - .tsv: a header, cells between tabs; quotes are text, as in GLUE's files.
    - .parquet: through pyarrow.
    - a directory laid out as a hub data set, or a hub id "owner/name", or "owner/name:configuration", each with its
      split; behind a hub id "#" and a branch, tag or commit. It must not need code of its own.

    Text is UTF-8, with or without a byte order mark, with LF or CRLF. CSV and TSV values are all text. Rows remember
    their place (`row.where`), which the errors of the data sets' modules then name.

    Raises:
      FileNotFoundError: neither such a file nor a possible hub id.
      ValueError: file and line of what is empty, malformed, not an object, or not UTF-8; a split that is not there; a
        URL that fsspec cannot open.
    """
    name = os.fspath(path_or_hub_id)
    path = Path(name).expanduser()
    if _is_url(name) or path.is_file():
        if split is not None:
            raise ValueError(f"{name}: found split {split!r}, expected none: a file has no splits")
        extension = _url_extension(name) if _is_url(name) else path.suffix
        reader = READERS.get(extension.lower())
        if reader is None:
            raise ValueError(f"{name}: found extension {extension!r}, expected one of {', '.join(READERS)}")
        place = name if _is_url(name) else str(path)
        with open_file(place) as opened:
            rows = reader(place, opened.read())
        if not rows:
            raise ValueError(f"{name}: found no rows, expected at least one")
        return rows
    if path.is_dir():
        return _read_hub(str(path), None, split)
    possible_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?(#[\w./-]+)?", name)
    if not possible_id or path.suffix.lower() in READERS:
        raise FileNotFoundError(f"{name}: found no such file, expected a data file or a hub id")
    hub_id, _, revision = name.partition("#")
    hub_id, _, configuration = hub_id.partition(":")
    return _read_hub(hub_id, configuration or None, split, revision or None)


def _url_extension(url: str) -> str:
    """Of the file that is meant: in a chain such as simplecache::s3://… or zip://…::s3://…, of the first URL."""
    first = next(link for link in url.split("::") if _is_url(link))
    return PurePosixPath(first.partition("?")[0]).suffix


def _text(path: str, data: bytes) -> str:
    text = decode_utf8(data, path)
    if not text.strip():
        raise ValueError(f"{path}: found an empty file, expected rows")
    return text


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {type(value).__name__} {value!r:.60}, expected a JSON object")
    return Row(value, where)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not str.splitlines: JSON strings and cells may hold U+2028 and other characters that it takes for line ends.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _jsonl_rows(path: str, text: str) -> list[Row]:
    rows = []
    for number, line in _lines(text):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:  # ValueError: also an integer of thousands of digits
            raise ValueError(f"{where}: found malformed JSON ({e}), expected one JSON object per line") from e
        rows.append(_object(value, where))
    return rows


def _read_jsonl(path: str, data: bytes) -> list[Row]:
    return _jsonl_rows(path, _text(path, data))


def _read_json(path: str, data: bytes) -> list[Row]:
    text = _text(path, data)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        if e.msg == "Extra data" and text.lstrip().startswith("{"):
            return _jsonl_rows(path, text)
        raise ValueError(f"{path}, line {e.lineno}: found malformed JSON ({e}), expected a list of objects") from e
    except (ValueError, RecursionError) as e:  # an integer of thousands of digits, or too deeply nested
        raise ValueError(f"{path}: found malformed JSON ({e}), expected a list of objects") from e
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) != 1:
            raise ValueError(
                f"{path}: found an object with {len(lists)} lists (keys: {', '.join(value) or 'none'}), expected a "
                "list of objects, or an object that holds exactly one"
            )
        value = lists[0]
    if not isinstance(value, list):
        raise ValueError(f"{path}: found {type(value).__name__} {value!r:.60}, expected a list of objects")
    return [_object(row, f"{path}, row {i} (from 0)") for i, row in enumerate(value)]


def _header(path: str, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"{path}, line {line}: found columns {names}, expected distinct names that are not empty")
    return names


def _table(path: str, records: Iterator[tuple[int, list[str]]]) -> list[Row]:
    """Rows from (line, cells); the first are the column names."""
    first, cells = next(records, (1, [""]))
    names = _header(path, first, cells)
    rows = []
    for line, cells in records:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}, line {line}: found {len(cells)} cells, expected {len(names)} ({', '.join(names)})"
            )
        rows.append(Row(dict(zip(names, cells, strict=True)), f"{path}, line {line}"))
    return rows


def _csv_records(path: str, text: str) -> Iterator[tuple[int, list[str]]]:
    # Lines keep their ends: they belong to quoted cells. A bare CR outside quotes is then an error of the csv module.
    reader = csv.reader((line + "\n" for line in text.removesuffix("\n").split("\n")), strict=True)
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as e:
            raise ValueError(
                f"{path}, line {reader.line_num}: found malformed CSV ({e}) in the row that begins on line {line}"
            ) from e
        if cells is None:
            return
        if cells and (len(cells) > 1 or cells[0].strip()):
            # CRLF inside a quoted cell is the file's line end, not the text's.
            yield line, [cell.replace("\r\n", "\n") for cell in cells]
        line = reader.line_num + 1


def _read_csv(path: str, data: bytes) -> list[Row]:
    return _table(path, _csv_records(path, _text(path, data)))


def _read_tsv(path: str, data: bytes) -> list[Row]:
    lines = _lines(_text(path, data))
    return _table(path, ((number, line.removesuffix("\r").split("\t")) for number, line in lines))


def _read_parquet(path: str, data: bytes) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{path}: found no readable Parquet ({e}), expected a Parquet file") from e
    return [Row(row, f"{path}, row {i} (from 0)") for i, row in enumerate(rows)]


READERS: dict[str, Callable[[str, bytes], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, configuration: str | None, split: str | None, revision: str | None = None) -> list[Row]:
    import datasets

    try:
        data = datasets.load_dataset(name, configuration, split=split, revision=revision)
    except Exception as e:  # datasets, huggingface_hub and requests each have their own
        if isinstance(e, FileNotFoundError):
            raise FileNotFoundError(f"{name}: found neither such a file nor such a data set on the hub: {e}") from e
        raise ValueError(f"{name}: the data set could not be loaded from the hub (split {split!r}): {e}") from e
    if isinstance(data, dict):
        if len(data) != 1:
            raise ValueError(f"{name}: found no split, expected one of {', '.join(data)}")
        ((split, data),) = data.items()
    rows = [Row(row, f"{name} ({split}), row {i} (from 0)") for i, row in enumerate(data)]
    if not rows:
        raise ValueError(f"{name} ({split}): found no rows, expected at least one")
    return rows
