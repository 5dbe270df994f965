import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
import tarfile
import zipfile

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data import DataSource, Example, load_examples
from jaxvaccine.data.files import file_sha256, read_rows

few = settings(max_examples=25)
# Everything that a data set may hold: line and paragraph separators, quotes, tabs, controls, emoji; no half characters.
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg", 'say "hi", she said\r\nand left', "👋\ufeff", " ", "\t", "\n", "a,b"]
)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "response": TEXT}), min_size=1, max_size=6)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@few
@given(ROWS, st.booleans(), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_jsonl_round_trip(folder, rows, ascii_only, end, bom, blank_lines):
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = ("\ufeff" if bom else "") + (end + (end if blank_lines else "")).join(lines)
    read = read_rows(write(folder / "a.jsonl", text))
    assert read == rows
    assert [r.where.rpartition("line ")[2] for r in read] == [str(1 + i * (1 + blank_lines)) for i in range(len(rows))]


@few
@given(ROWS, st.booleans(), st.sampled_from(["list", "object", "lines"]))
def test_json_round_trip(folder, rows, ascii_only, form):
    if form == "lines":
        rows = [*rows, *rows]  # one line alone is a JSON object, which holds no list
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    else:
        text = json.dumps(rows if form == "list" else {"version": "1", "data": rows}, ensure_ascii=ascii_only, indent=1)
    assert read_rows(write(folder / "a.json", text)) == rows


@few
@given(ROWS, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_csv_round_trip(folder, rows, end, bom):
    path = folder / "a.csv"
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as f:
        writer = csv.DictWriter(f, ["prompt", "response"], lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    # A line end inside a cell is the file's.
    assert read_rows(path) == [{k: v.replace("\r\n", "\n") for k, v in row.items()} for row in rows]


@few
@given(ROWS, st.sampled_from(["\n", "\r\n"]))
def test_tsv_round_trip_with_quotes_as_text(folder, rows, end):
    rows = [{k: "x" + "".join(c for c in v if c not in "\t\r\n") for k, v in row.items()} for row in rows]
    text = "prompt\tresponse" + end + "".join(f"{r['prompt']}\t{r['response']}{end}" for r in rows)
    assert read_rows(write(folder / "a.tsv", text)) == rows


def test_tsv_quotes_need_no_partner(tmp_path):
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\n" an opening quote alone\t1\nthe end "\t0\n')
    assert [r["sentence"] for r in read_rows(path)] == ['" an opening quote alone', 'the end "']


def test_csv_cell_over_lines_keeps_later_line_numbers_right(tmp_path):
    path = write(tmp_path / "a.csv", 'goal,target\r\n"one\r\ntwo","x"\r\n\r\nthree,y\r\nfour\r\n')
    with pytest.raises(ValueError, match=r"a\.csv, line 6: found 1 cells, expected 2 \(goal, target\)"):
        read_rows(path)
    write(path, 'goal,target\r\n"one\r\ntwo","x"\r\n\r\nthree,y\r\n')
    rows = read_rows(path)
    assert rows == [{"goal": "one\ntwo", "target": "x"}, {"goal": "three", "target": "y"}]
    assert [r.where[-6:] for r in rows] == ["line 2", "line 5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "found an empty file"),
        ("a.json", " \r\n\t", "found an empty file"),
        ("a.csv", "\ufeff\n", "found an empty file"),
        ("a.csv", "goal,target\n", "found no rows"),
        ("a.csv", '""\n', "found an empty file"),
        ("a.csv", "a,,b\n1,2,3\n", r"line 1: found columns \['a', '', 'b'\]"),
        ("a.tsv", "sentence\tlabel\r\n\r\n", "found no rows"),
        ("a.json", "[]", "found no rows"),
        ("a.json", '{"data": []}', "found no rows"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', r"a\.jsonl, line 3: found malformed JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl, line 2: found list \[1\], expected a JSON object"),
        ("a.jsonl", '{"a": 1}\nnull\n', r"line 2: found NoneType None"),
        ("a.jsonl", '{"a": 1} {"a": 2}\n', r"line 1: found malformed JSON \(Extra data"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"line 1: found malformed JSON"),
        ("a.jsonl", "[" * 100_000, r"line 1: found malformed JSON"),
        ("a.json", '[{"a": 1},\n{"a": }]', r"a\.json, line 2: found malformed JSON"),
        ("a.json", '{"a": 1}\n{"a": }\n', r"a\.json, line 2: found malformed JSON"),
        ("a.json", '[{"a": 1}, "x"]', r"row 1 \(from 0\): found str 'x', expected a JSON object"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"x": 2}]}', r"found an object with 2 lists of objects \(keys: a, b\)"),
        ("a.json", '{"a": [1, 2], "b": [2]}', r"found columns of different lengths \(a: 2, b: 1\)"),
        ("a.json", '{"a": []}', "found no rows"),
        ("a.jsonl", '[{"a": 1},\n 2]', r"row 1 \(from 0\): found int 2"),
        ("a.jsonl", '[{"a": 1},\n', r"line 2: found malformed JSON"),
        ("a.json", '"text"', "found str 'text', expected a list of objects"),
        ("a.csv", 'a,b\n"x,1\ny,2\n', r"line 3: found malformed CSV \(.*\) in the row that begins on line 2"),
        ("a.csv", 'a,b\n"x"y,1\n', r"line 2: found malformed CSV"),
        ("a.csv", "a,b\n1,2,3\n", r"line 2: found 3 cells, expected 2 \(a, b\)"),
        ("a.csv", "a,a\n1,2\n", r"line 1: found columns \['a', 'a'\]"),
        ("a.tsv", "a\tb\n1\t2\n3\n", r"line 3: found 1 cells, expected 2"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', r"a\.jsonl, line 2: found byte 0xff at offset 18, expected UTF-8"),
        ("a.csv", b"\xef\xbb\xbfa,b\n\xe9,2\n", r"a\.csv, line 2: found byte 0xe9 at offset 7, expected UTF-8"),
        ("a.tsv", "a\tb\n".encode("utf-16"), r"line 1: found byte 0xff at offset 0"),
        ("a.txt", " \n", "found an empty file"),
        ("a.txt", b"a\nb\xff\n", "line 2: found byte 0xff at offset 3"),
        ("a.xml", "x", r"found extension '\.xml', expected one of \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.txt, "),
        ("a.xml.gz", "x", r"found extension '\.xml'"),
        ("a.parquet", "x", "found no readable Parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert name in str(error.value)


@pytest.mark.parametrize("content, rows", [
    ('{"instruction": "a", "output": "b"}\n', [{"instruction": "a", "output": "b"}]),
    ('{"instruction": "a", "tags": ["x", "y"]}', [{"instruction": "a", "tags": ["x", "y"]}]),
    ('{\n "instruction": "a",\n "steps": [{"n": 1}]\n}\n', [{"instruction": "a", "steps": [{"n": 1}]}]),
    ('{"messages": [{"role": "user", "content": "a"}]}', [{"messages": [{"role": "user", "content": "a"}]}]),
    ('[{"a": 1},\n{"a": 2}]', [{"a": 1}, {"a": 2}]),
    ('\n[{"a": 1}]\n', [{"a": 1}]),
    ('{"data": [{"a": 1}, {"a": 2}], "version": "1", "authors": ["x"]}', [{"a": 1}, {"a": 2}]),
    ('{"prompt": ["a", "b"], "response": ["c", "d"]}', [{"prompt": "a", "response": "c"},
                                                        {"prompt": "b", "response": "d"}]),
    ('{"prompt": ["a", "b"], "category": [{"x": true}, {}]}', [{"prompt": "a", "category": {"x": True}},
                                                               {"prompt": "b", "category": {}}]),
    ('{"prompt": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}', [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]),
    ('{"prompt": {"text": "a"}, "continuation": {"text": "b"}}', [{"prompt": {"text": "a"},
                                                                   "continuation": {"text": "b"}}]),
    ('\ufeff{"a": 1}\r\n\r\n{"a": 2}', [{"a": 1}, {"a": 2}]),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_json_is_read_by_what_it_holds(tmp_path, name, content, rows):
    assert read_rows(write(tmp_path / name, content)) == rows


@pytest.mark.parametrize("index, rows", [(True, [3, 4]), (False, [3, 4])])
def test_csv_of_pandas(tmp_path, index, rows):
    """Row numbers under no name, saved once, read and saved again; and cells beyond the csv module's limit."""
    import pandas

    long = "x" * 140_000
    table = pandas.DataFrame({"goal": ["Do, it", long], "n": rows})
    table.to_csv(tmp_path / "a.csv", index=index)
    expected = [{"goal": "Do, it", "n": "3"}, {"goal": long, "n": "4"}]
    assert read_rows(tmp_path / "a.csv") == expected
    pandas.read_csv(tmp_path / "a.csv").to_csv(tmp_path / "b.csv")
    assert read_rows(tmp_path / "b.csv") == expected
    table.to_csv(tmp_path / "c.tsv", sep="\t")
    assert read_rows(tmp_path / "c.tsv") == expected
    table.to_json(tmp_path / "d.json")
    assert read_rows(tmp_path / "d.json") == [{**row, "n": int(row["n"])} for row in expected]
    for lines in (True, False):
        table.to_json(tmp_path / "e.json", orient="records", lines=lines)
        assert read_rows(tmp_path / "e.json") == [{**row, "n": int(row["n"])} for row in expected]
    table[table.n > 3].to_parquet(tmp_path / "f.parquet")  # with row numbers of its own
    assert read_rows(tmp_path / "f.parquet") == [{"goal": long, "n": 4}]


def test_text_is_a_line_a_row(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\u2028line\r\n\r\n\n two\t\n")
    assert [(row, row.where[-6:]) for row in read_rows(path)] == [
        ({"text": "one\u2028line"}, "line 1"), ({"text": " two\t"}, "line 4")]


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@few
@given(ROWS, st.sampled_from(sorted(PACKED)), st.sampled_from([".jsonl", ".JSON", ".csv", ".tsv", ".txt"]))
def test_compressed_round_trip(folder, rows, packing, extension):
    """As the same file is read that is not compressed; by its bytes, whatever the name says."""
    text = (json.dumps(rows) if extension == ".JSON" else "a\tb\n1\t2\n" if extension == ".tsv" else
            "x\n1\n2\n" if extension != ".jsonl" else "\n".join(map(json.dumps, rows)))
    expected = read_rows(write(folder / f"plain{extension}", text))
    packed = PACKED[packing](text.encode())
    assert read_rows(write(folder / f"a{extension}{packing}", packed)) == expected
    assert read_rows(write(folder / f"b{extension}", packed)) == expected
    half = len(packed) // 2
    several = PACKED[packing](text.encode()[:half]) + PACKED[packing](text.encode()[half:])
    assert read_rows(write(folder / f"c{extension}{packing}", several)) == expected


@pytest.mark.parametrize("packing", sorted(PACKED))
def test_damaged_compressed_files(tmp_path, packing):
    import random

    text = "".join(json.dumps({"a": random.Random(i).random()}) + "\n" for i in range(5000)).encode()
    packed = PACKED[packing](text)
    for damaged in (packed[: len(packed) // 2], packed[:99] + bytes(99) + packed[198:]):
        with pytest.raises(ValueError, match=rf"a\.jsonl\{packing}: found a damaged \w+ file \(.*, expected a whole"):
            read_rows(write(tmp_path / f"a.jsonl{packing}", damaged))
    with pytest.raises(ValueError, match=r"found b'.\\*\"a.*' at its start, expected a \w+ file"):
        read_rows(write(tmp_path / f"b.jsonl{packing}", text))


def test_zstandard(tmp_path, monkeypatch):
    from jaxvaccine.data import compressed

    magic = b"\x28\xb5\x2f\xfd"
    with monkeypatch.context() as patch:
        patch.setattr(compressed, "_module", lambda name: None)  # as where it is not installed
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst: found a Zstandard file and nothing to read it with"):
            read_rows(write(tmp_path / "a.jsonl.zst", magic + b"rest"))
    zstandard = pytest.importorskip("zstandard")
    text = "".join(json.dumps({"a": i}) + "\n" for i in range(20_000)).encode()
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    whole = pack(text[:50_000]) + pack(text[50_000:])
    assert read_rows(write(tmp_path / "a.jsonl.zst", whole)) == [{"a": i} for i in range(20_000)]
    for damaged in (whole[:-5], whole[:200] + bytes(9) + whole[209:]):
        with pytest.raises(ValueError, match="found a damaged Zstandard file"):
            read_rows(write(tmp_path / "b.jsonl.zst", damaged))


@pytest.mark.parametrize("name", ["no/such.jsonl", "such.csv", "/no/such", "../no such file here", "a b"])
def test_missing_file(name):
    with pytest.raises(FileNotFoundError, match="found no such file"):
        read_rows(name)


def test_files_have_no_splits(tmp_path):
    with pytest.raises(ValueError, match="found split 'train', expected none"):
        read_rows(write(tmp_path / "a.jsonl", '{"a": 1}'), "train")


def test_sha256_is_of_the_bytes(tmp_path):
    content = b"a\r\n" * 100_000
    assert file_sha256(write(tmp_path / "a.jsonl", content)) == hashlib.sha256(content).hexdigest()


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "a", "is_safe": True}, {"prompt": "ü\n", "is_safe": False}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows


@pytest.fixture
def memory():
    """A place that fsspec knows and this machine's file system does not."""
    file_system = fsspec.filesystem("memory")

    def put(name, content):
        file_system.pipe_file(f"/bucket/{name}", content if isinstance(content, bytes) else content.encode())

    yield put
    file_system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"goal": "ü", "target": "b"}\n'), ("a.json", '[{"goal": "ü", "target": "b"}]'),
    ("a.csv", '"goal",target\r\nü,b\r\n'), ("A.TSV", "goal\ttarget\nü\tb\n"), ("a.parquet", None),
])  # fmt: skip
def test_a_url_is_read_as_a_file_is(tmp_path, memory, name, content):
    rows = [{"goal": "ü", "target": "b"}]
    if content is None:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name)
        content = (tmp_path / name).read_bytes()
    path, url = write(tmp_path / name, content), f"memory://bucket/{name}"
    memory(name, content)
    assert read_rows(url) == read_rows(path) == rows
    # What the rows remember of their place differs in the file's name alone.
    assert read_rows(url)[0].where == read_rows(path)[0].where.replace(str(path), url)
    assert file_sha256(url) == file_sha256(path)
    assert load_examples(f" advbench : {url} [0:1]") == [Example("ü", "", "b")]
    assert str(DataSource.parse(f"advbench:{url}[0:1]")) == f"advbench:{url}[0:1]"


def test_urls_of_files_in_archives_and_on_disk(tmp_path, memory):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("inner/a.jsonl", '{"a": 1}\n')
    memory("all.zip", archive.getvalue())
    url = "zip://inner/a.jsonl::memory://bucket/all.zip"
    assert read_rows(url) == [{"a": 1}] and read_rows(url)[0].where == f"{url}, line 1"
    memory("b.jsonl", '{"a": 2}\n')
    assert read_rows("simplecache::memory://bucket/b.jsonl") == [{"a": 2}]
    assert read_rows(write(tmp_path / "c.jsonl", '{"a": 3}\n').as_uri()) == [{"a": 3}]


@pytest.mark.parametrize("name, content, rows", [
    ("a.jsonl", b'{"a": 1}\n', [{"a": 1}]), ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n'), [{"a": 1}]),
    ("a.json", b'{"a": ["b",\n"c"]}', [{"a": "b"}, {"a": "c"}])])
@pytest.mark.parametrize("archive", ["all.tar.gz", "all.zip"])
def test_a_file_in_an_archive_is_read_by_its_own_name(memory, archive, name, content, rows):
    packed = io.BytesIO()
    if archive.endswith("zip"):
        with zipfile.ZipFile(packed, "w") as opened:
            opened.writestr(name, content)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as opened:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
    memory(archive, packed.getvalue())
    assert read_rows(f"{archive.split('.')[1]}://{name}::memory://bucket/{archive}") == rows


@pytest.mark.parametrize("content, message", [
    ("", "memory://bucket/a.jsonl: found an empty file"),
    ('{"a": 1}\n{"a": \n', r"memory://bucket/a\.jsonl, line 2: found malformed JSON"),
    (b'{"a": "x"}\n\xff', r"memory://bucket/a\.jsonl, line 2: found byte 0xff at offset 11, expected UTF-8"),
])  # fmt: skip
def test_errors_name_the_url(memory, content, message):
    memory("a.jsonl", content)
    with pytest.raises(ValueError, match=message):
        read_rows("memory://bucket/a.jsonl")
    with pytest.raises(ValueError, match="found split 'train', expected none"):
        read_rows("memory://bucket/a.jsonl", "train")


@pytest.mark.parametrize("url, kind, message", [
    ("memory://bucket/none.jsonl", FileNotFoundError, "found no such file$"),
    ("none://bucket/a.jsonl", ValueError, "found no file that can be read, expected a URL .*Protocol not known: none"),
    ("s3://bucket/a.jsonl", ValueError, "found no file that can be read, expected a URL .*s3fs"),
    ("s3://bucket/a.xml", ValueError, "found extension '.xml', expected one of .jsonl"),
    ("https://host/a.xml?name=a.jsonl", ValueError, "found extension '.xml', expected one of .jsonl"),
    ("s3://bucket.jsonl/a", ValueError, "found extension '', expected one of .jsonl"),
])  # fmt: skip
def test_urls_that_cannot_be_read(monkeypatch, url, kind, message):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(kind, match=message) as error:
        read_rows(url)
    assert str(error.value).startswith(f"{url}: ")


def test_a_url_that_breaks_off(monkeypatch, memory):
    memory("a.jsonl", "{}")

    def cat_file(*_, **__):
        raise ConnectionResetError("peer went away")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", cat_file)
    with pytest.raises(ValueError, match=r"bucket/a.jsonl: found no file .*ConnectionResetError: peer went away"):
        read_rows("memory://bucket/a.jsonl")


def test_data_set_directory_with_splits(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"a": "1"}\n{"a": "2"}\n')
    write(folder / "test.jsonl", '{"a": "3"}\n')
    rows = read_rows(folder, "test")
    assert rows == [{"a": "3"}] and rows[0].where.endswith("(test), row 0 (from 0)")
    with pytest.raises(ValueError, match="found no split, expected one of train, test"):
        read_rows(folder)
    with pytest.raises(ValueError, match=r"could not be loaded .*split 'dev'"):
        read_rows(folder, "dev")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("owner/name", ("owner/name", None, None)), ("sst2", ("sst2", None, None)),
     ("openai/gsm8k:main", ("openai/gsm8k", "main", None)), ("owner/name#refs/pr/1", ("owner/name", None, "refs/pr/1")),
     ("openai/gsm8k:main#740312add88f", ("openai/gsm8k", "main", "740312add88f"))],
)
def test_hub_id(monkeypatch, name, arguments):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"a": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows(name, "train") == [{"a": "1"}]
    *names, revision = arguments
    # Nothing more: no code of the data set's repository may run.
    assert calls == [(tuple(names), {"split": "train", "revision": revision})]


@pytest.mark.parametrize("kind", [FileNotFoundError, ConnectionError])
def test_hub_error_names_the_data_set(monkeypatch, kind):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise kind("reason")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises((FileNotFoundError, ValueError), match=r"owner/name: .*reason"):
        read_rows("owner/name", "train")
