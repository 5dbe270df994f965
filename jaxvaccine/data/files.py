"""Rows from files and from the Hugging Face hub, as they are asked for; fsspec opens what lies elsewhere than here."""

import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxvaccine.data import formats
from jaxvaccine.data.compressed import NAMES, decompressed, extension, is_url
from jaxvaccine.data.rows import NoRowsError, OnBad, Row, raise_it


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
    if not is_url(name):
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


def read_rows(path_or_hub_id: str | os.PathLike, split: str | None = None) -> list[Row]:
    """All rows of `iter_rows`."""
    return list(iter_rows(path_or_hub_id, split))


def iter_rows(path_or_hub_id: str | os.PathLike, split: str | None = None, bad: OnBad = raise_it,
              header: formats.Header = formats.named, stream: bool = False) -> Iterator[Row]:
    """The rows of a file, by its extension and what it holds, or of a data set on the Hugging Face hub, one by one: no
    more is read than is asked for.

    A file is a path, or a URL as of `open_file`.

    - .jsonl, .ndjson, .json: one object per line, blank lines are skipped; or one JSON value: a list of objects, an
      object that holds one list of them ({"data": [...]}), columns ({"prompt": [...], "response": [...]}), or one row.
    - .csv: RFC 4180 with a header, so that quoted cells may span lines; columns of row numbers, as pandas writes them
      first, are none of the rows'.
    - .tsv: a header, cells between tabs; quotes are text, as in GLUE's files.
    - .txt: a text a line, as the column `text`.
    - any of these compressed, with .gz, .bz2, .xz or .zst behind the extension.
    - .parquet: through pyarrow.
    - a directory laid out as a hub data set, or a hub id "owner/name", or "owner/name:configuration", each with its
      split; behind a hub id "#" and a branch, tag or commit. It must not need code of its own.

    Text is UTF-8, with or without a byte order mark, with LF or CRLF. CSV and TSV values are all text. Rows remember
    their place (`row.where`), which the errors of the data sets' modules then name.

    Args:
      path_or_hub_id, split: of the rows; a file has no split.
      bad: is told of every row that cannot be read; raises, or leaves it out.
      header: names the columns of a table without names.
      stream: of a hub data set, fetch rows as they are asked for, and not all of them first.

    Raises (when the first row is asked for, or the one that is meant):
      FileNotFoundError: neither such a file nor a possible hub id.
      ValueError: file and line of what is empty, malformed, not an object, or not UTF-8; a split that is not there; a
        URL that fsspec cannot open; a compressed file that is damaged.
    """
    name, found = os.fspath(path_or_hub_id), False
    for row in _rows(name, split, bad, header, stream):
        found = True
        yield row
    if not found:
        # Of a file whose rows are all bad, the reader of the rows says so.
        raise NoRowsError(f"{name}{f' ({split})' if split else ''}: found no rows, expected at least one")


def _rows(name: str, split: str | None, bad: OnBad, header: formats.Header, stream: bool) -> Iterator[Row]:
    path = Path(name).expanduser()
    if is_url(name) or path.is_file():
        if split is not None:
            raise ValueError(f"{name}: found split {split!r}, expected none: a file has no splits")
        ending = extension(name)
        place = name if is_url(name) else str(path)
        if ending == ".parquet":
            yield from _read_parquet(place)
            return
        reader = formats.READERS.get(ending)
        if reader is None:
            raise ValueError(f"{name}: found extension {ending!r}, expected one of {', '.join(EXTENSIONS)}, or of "
                             f"the first six with {', '.join(NAMES)} behind it")
        with open_file(place) as opened, decompressed(opened, place) as plain:
            yield from reader(place, plain, bad, header)
        return
    if path.is_dir():
        yield from _read_hub(str(path), None, split, stream=stream)
        return
    possible_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?(#[\w./-]+)?", name)
    if not possible_id or extension(name) in EXTENSIONS:
        raise FileNotFoundError(f"{name}: found no such file, expected a data file or a hub id")
    hub_id, _, revision = name.partition("#")
    hub_id, _, configuration = hub_id.partition(":")
    yield from _read_hub(hub_id, configuration or None, split, revision or None, stream)


def _read_parquet(path: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with open_file(path) as opened:
        try:
            file = pyarrow.parquet.ParquetFile(opened)
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: found columns {names}, expected distinct names")
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    yield Row({name: value for name, value in values.items() if not formats.is_row_number(name)},
                              f"{path}, row {number} (from 0)")
                    number += 1
        except (pyarrow.ArrowException, OSError) as e:
            raise ValueError(f"{path}: found no readable Parquet ({e}), expected a Parquet file") from e


EXTENSIONS = (*formats.READERS, ".parquet")


def _read_hub(name: str, configuration: str | None, split: str | None, revision: str | None = None,
              stream: bool = False) -> Iterator[Row]:
    import datasets

    # Offline there is only what was fetched before, which cannot be streamed; a directory's files are there.
    streaming = {"streaming": True} if stream and (Path(name).is_dir() or not datasets.config.HF_HUB_OFFLINE) else {}
    number = 0
    try:
        data = datasets.load_dataset(name, configuration, split=split, revision=revision, **streaming)
        if isinstance(data, dict):
            if len(data) != 1:
                raise _SplitError(f"{name}: found no split, expected one of {', '.join(data)}")
            ((split, data),) = data.items()
        rows = iter(data)
        while (row := next(rows, None)) is not None:
            place = f"{name} ({split}), row {number} (from 0)"
            number += 1
            yield Row(row, place)
    except _SplitError:
        raise
    except Exception as e:  # datasets, huggingface_hub and requests each have their own
        if isinstance(e, FileNotFoundError) and not number:
            raise FileNotFoundError(f"{name}: found neither such a file nor such a data set on the hub: {e}") from e
        raise ValueError(f"{name}: the data set could not be loaded from the hub (split {split!r}): {e}") from e


class _SplitError(ValueError):
    """No split is named of several."""
