"""JSON on disk: read with errors that name the line, written whole or not at all."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.json_files import read_json, read_json_object, write_json

# Half a character too, which UTF-8 has no bytes for.
TEXT = st.text(max_size=10) | st.just("half a character: \ud83d")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
                      max_leaves=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


@settings(max_examples=50)
@given(VALUES)
def test_round_trip(folder, value):
    write_json(folder / "a.json", value)
    assert read_json(folder / "a.json") == value
    assert os.listdir(folder) == ["a.json"]
    if isinstance(value, dict):
        assert read_json_object(folder / "a.json") == value
    else:
        with pytest.raises(ValueError, match=r"a\.json: found a JSON \w+, expected an object"):
            read_json_object(folder / "a.json")


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(str(path), {"ü": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "ü": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert os.listdir(tmp_path) == ["x.json"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"ü": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": 1}


def test_byte_order_mark_and_crlf(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf[1,\r\n2]\r\n")
    assert read_json(path) == [1, 2]


@pytest.mark.parametrize("content, message", [
    (b"", r"a\.json, line 1: found malformed JSON"),
    (b'{\n "a": 1,\n "b" 2\n}', r"a\.json, line 3: found malformed JSON \(.* column 6 .*, expected JSON$"),
    (b'{"a": "x",\n"b": "\xff"}', r"a\.json, line 2: found byte 0xff at offset 17, expected UTF-8$"),
    (b'\xef\xbb\xbf"\xff"', r"a\.json, line 1: found byte 0xff at offset 4, expected UTF-8$"),
    (b"9" * 5000, r"a\.json: found malformed JSON"),
    (b"[" * 100_000, r"a\.json: found malformed JSON"),
])  # fmt: skip
def test_malformed(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    for read in (read_json, read_json_object):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "a.json")


def test_absent(tmp_path):
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="found no such file"):
            read_json(path)
