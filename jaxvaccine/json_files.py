"""JSON files, read with errors that name the line and written whole or not at all; and UTF-8, with such errors."""

import json
import os
from pathlib import Path
from typing import Any


def decode_utf8(data: bytes, name: str | os.PathLike) -> str:
    """The text of a file, with or without a byte order mark. Raises ValueError that names file, line and byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        # The decoder's position does not count a byte order mark that it has removed.
        start = e.start + (len(data) - len(e.object))
        line = data.count(b"\n", 0, start) + 1
        raise ValueError(
            f"{name}, line {line}: found byte 0x{data[start]:02x} at offset {start}, expected UTF-8") from e


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value in a file (UTF-8, with or without byte order mark).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not UTF-8 or not JSON; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file")
    text = decode_utf8(path.read_bytes(), path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {e.lineno}: found malformed JSON ({e}), expected JSON") from e
    except (ValueError, RecursionError) as e:  # an integer of thousands of digits, or too deeply nested
        raise ValueError(f"{path}: found malformed JSON ({e}), expected JSON") from e


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """As `read_json`, of a file that must hold an object; ValueError if it holds another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as JSON, whole or not at all: first to "NAME.tmp" beside it, then by a rename."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    # backslashreplace writes a lone surrogate, which UTF-8 has no bytes for, as JSON's own escape.
    text = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    temporary.write_bytes(text)
    os.replace(temporary, path)
