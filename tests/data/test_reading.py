"""How far a source is read, what becomes of rows that cannot be read, and columns by other names."""

import gzip
import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine import data
from jaxvaccine.data import DataSource, Example, describe, files, load, load_examples, read_rows, record

few = settings(max_examples=40)


def lines(*rows):
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def qa(i, answer="a", **more):
    return {"prompt": f"p{i}", "response": answer, **more}


class Counted:
    """A file that knows how many of its lines were read."""

    def __init__(self, text):
        self.lines, self.given, self.name = text.encode().splitlines(keepends=True), 0, "counted"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __iter__(self):
        for number, line in enumerate(self.lines, 1):
            self.given = number
            yield line

    def peek(self, size):
        return self.lines[0][:size]


@pytest.fixture
def counted(monkeypatch, tmp_path):
    def put(name, text):
        opened = Counted(text)
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(files, "open_file", lambda path: opened)
        return opened, tmp_path / name

    return put


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", lines(*(qa(i) for i in range(1000)))),
    ("a.json", lines(*(qa(i) for i in range(1000)))),
    ("a.csv", "prompt,response\n" + "".join(f'p{i},"a\nb"\n' for i in range(500))),
    ("a.tsv", "prompt\tresponse\n" + "".join(f"p{i}\ta\n" for i in range(1000))),
    ("a.txt", "".join(f"p{i}\n" for i in range(1000))),
])  # fmt: skip
def test_a_slice_reads_no_further_than_it_needs(counted, name, text):
    opened, path = counted(name, text)
    kind = "prompts" if name.endswith("txt") else "instructions"
    for slice_, needed in (("[0:5]", 5), ("[3:20]", 20)):
        for protocol in ("distinct", "rows"):
            examples, (account,) = load(f"{kind}:{path}{slice_}", protocol)
            assert [e.instruction for e in examples] == [f"p{i}" for i in range(needed)][-len(examples):]
            assert opened.given <= 1 + 2 * needed if name == "a.csv" else opened.given <= 1 + needed
            assert (account.rows, account.partly) == (needed, True)
    for slice_ in ("", "[5:]", "[:-3]", "[-3:]"):
        _, (account,) = load(f"{kind}:{path}{slice_}")
        assert opened.given == len(opened.lines) and not account.partly


def test_memory_is_for_what_is_used(tmp_path):
    """500 rows of a packed file of 20 MB unpacked, and a single one at its end, without the rows between."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as f:
        for i in range(20_000):
            f.write(json.dumps({"prompt": f"p{i}", "response": "word " * 200, "is_safe": i != 19_999}) + "\n")
    tracemalloc.start()
    for source, count in ((f"instructions:{path}[0:500]", 500), (f"beavertails_unsafe:{path}", 1)):
        tracemalloc.reset_peak()
        assert len(load_examples(source)) == count
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


prompts = st.lists(
    st.tuples(st.sampled_from(["a", "A", " a", "b", "B", "c", "", "d"]), st.sampled_from(["", "x", "y"])),
    min_size=1, max_size=14)


@few
@given(prompts, st.integers(0, 6), st.integers(0, 6), st.sampled_from(["distinct", "rows"]))
def test_a_slice_is_that_of_the_whole(tmp_path_factory, rows, start, stop, protocol):
    """Stopping early changes nothing: the slice has the examples that it has of all rows, filled answers included."""
    path = tmp_path_factory.mktemp("s") / "a.jsonl"
    path.write_text(lines(*({"prompt": p, "response": r} for p, r in rows)))
    everything = load_examples(f"instructions:{path}", protocol)
    first_before = {data.fingerprint(e) for e in everything[:start] if e.instruction}
    expected = [e for e in everything[start:stop]
                if protocol == "rows" or not e.instruction or data.fingerprint(e) not in first_before]
    try:
        assert load_examples(f"instructions:{path}[{start}:{stop}]", protocol) == expected
    except ValueError as error:
        assert not expected or stop > len(everything)
        assert "empty slice" in str(error) or f"expected at most {len(everything)} examples" in str(error)


def test_an_unknown_category_is_found_though_the_slice_is_full(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*({**qa(i), "is_safe": False, "category": {"theft": True}} for i in range(9))))
    with pytest.raises(ValueError, match="found category 'arson', expected one of theft"):
        load_examples(f"beavertails_unsafe:{path}{{category=theft;arson}}[0:2]")
    assert len(load_examples(f"beavertails_unsafe:{path}{{category=theft}}[0:2]")) == 2


def test_errors_behind_a_slice_are_not_met(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(qa(0), qa(1), "{", qa(2)))
    assert len(load_examples(f"instructions:{path}[0:2]")) == 2
    with pytest.raises(ValueError, match="line 3: found malformed JSON"):
        load_examples(f"instructions:{path}[0:3]")


BAD = lines(qa(0), "{", "[1]", qa(1, 5), {"prompt": "p2"}, qa(2, history=["x"]), qa(3)).encode() + b'"\xff"\n'


def test_bad_rows_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: found malformed JSON"):
        load_examples(f"instructions:{path}")
    examples, (account,) = load(f"instructions:{path}", bad_rows="skip")
    assert [e.instruction for e in examples] == ["p0", "p3"]
    reasons = {
        "malformed JSON": 1, "no JSON object": 1, "column 'response': no text": 1, "not UTF-8": 1,
        "missing column 'output' or 'response' or 'answer' or 'completion'": 1, "column 'history'": 1}
    assert dict(account.bad) == reasons and (account.rows, account.examples) == (8, 2)
    assert "left out 6 of 8 rows: " in caplog.text and "1 malformed JSON" in caplog.text
    assert "6 bad rows (1 column 'history', " in describe(account)
    stored = record({"alignment": (account,)})["alignment"][account.source]
    assert stored["bad"] == reasons and json.loads(json.dumps(stored)) == stored
    path.write_text(lines("{x", "}"))
    with pytest.raises(ValueError, match=r"no rows of this kind \(2 rows, 2 bad rows, the first is .*line 1: found "):
        load_examples(f"instructions:{path}", bad_rows="skip")
    path.write_text(lines({**qa(0), "is_safe": False, "category": {"x": True}}, "{",
                          {"prompt": 3, "response": "r", "is_safe": False, "category": {"x": True}}))
    assert len(data.load_categories(f"beavertails_unsafe:{path}", "skip")) == 1


@pytest.mark.parametrize("name, content, kept", [
    ("a.csv", b'goal,target\na,b\nc\n"d"e,f\n\xff,g\n"h\xff\ni",j\nk,l\nm,\xff', ["a", "k"]),
    ("a.tsv", b"goal\ttarget\na\tb\nc\n\xff\tg\nk\tl\n", ["a", "k"]),
    ("a.json", b'[{"goal": "a", "target": "b"}, 3, {"goal": "k", "target": ""}]', ["a", "k"]),
    ("a.json", b'{"goal": "a", "target": "b"}\n{\n{"goal": "k", "target": "l"}\n', ["a", "k"]),
])  # fmt: skip
def test_bad_rows_of_every_format(tmp_path, name, content, kept):
    path = tmp_path / name
    path.write_bytes(content)
    examples, (account,) = load(f"advbench:{path}", bad_rows="skip")
    assert [e.instruction for e in examples] == kept
    bad = sum(n for _, n in account.bad)
    assert account.rows == len(kept) + bad and bad == (5 if name == "a.csv" else 2 if name == "a.tsv" else 1)
    with pytest.raises(ValueError):
        load_examples(f"advbench:{path}")


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", 'goal,target\na,b\nc,"d\ne,f\n', "unexpected end of data"),
    ("a.json", '[{"goal": "a", "target": "b"},', "malformed JSON"), ("a.csv", "goal,goal\na,b\n", "distinct names"),
    ("a.jsonl", "", "empty file"),
    # The next row would be taken for the header.
    ("a.csv", b"go\xffal,target\na,b\nc,d\n", "line 1: found byte 0xff at offset 2, expected UTF-8"),
    ("a.tsv", b"go\xffal\ttarget\na\tb\nc\td\n", "line 1: found byte 0xff at offset 2, expected UTF-8"),
    ("a.csv", 'goal,"target" x\na,b\nc,d\n', "malformed CSV"),
    ("a.jsonl", b"\xff\n\xfe\n", r"no rows of this kind \(2 rows, 2 bad rows, .*line 1: found byte 0xff"),
    ("a.txt", b"\xff\n\xfe\n", r"no rows of this kind \(2 rows, 2 bad rows, .*line 1: found byte 0xff")])
def test_what_no_row_alone_is_to_blame_for_is_an_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        load_examples(f"advbench:{path}", bad_rows="skip")


def test_a_name_twice_is_not_read_as_its_last_value(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"goal": "a", "goal": "b", "target": "c"}\n' + lines({"goal": "d", "target": "e"}))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: found malformed JSON \(the name 'goal' twice in one"):
        load_examples(f"advbench:{path}")
    assert [e.instruction for e in load_examples(f"advbench:{path}", bad_rows="skip")] == ["d"]
    path = tmp_path / "a.json"
    path.write_text('[\n{"goal": "a", "target": "b", "target": "c"}]')
    with pytest.raises(ValueError, match="the name 'target' twice in one object"):
        load_examples(f"advbench:{path}")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [arrow.array([text]) for text in "abc"]
    parquet.write_table(arrow.Table.from_arrays(columns, ["goal", "goal", "target"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: found columns \['goal', 'goal', 'target'\], expected distinct"):
        load_examples(f"advbench:{tmp_path / 'a.parquet'}")


def test_bad_rows_of_a_kind_that_looks_at_several(tmp_path):
    rows = [{"instruction": f"i{i}", "output": "o" * (i != 1), "generator": "m"} for i in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*rows))
    examples, (account,) = load(f"alpaca_eval:{path}", bad_rows="skip")
    assert [e.instruction for e in examples] == ["i0", "i2"] and account.bad == (("column 'output'", 1),)
    path.write_text(lines(*rows[:1], {**rows[2], "generator": "n"}))
    with pytest.raises(ValueError, match="column 'generator': found 'n', expected 'm'"):
        load_examples(f"alpaca_eval:{path}")


@pytest.mark.parametrize("text, source", [
    ("instructions:a.csv{columns instruction=q;output=the answer}[0:3]", DataSource(
        "instructions", "a.csv", None, 0, 3, columns=(("instruction", "q"), ("output", "the answer")))),
    ("beavertails_unsafe:P/B@x{ columns  prompt = q } {not category=a,b} ", DataSource(
        "beavertails_unsafe", "P/B", "x", None, None, ("a,b",), True, (("prompt", "q"),))),
    ("advbench:a.csv{category=a}{columns goal=g}", DataSource(
        "advbench", "a.csv", categories=("a",), columns=(("goal", "g"),))),
])
def test_columns_in_a_source(text, source):
    assert DataSource.parse(text) == source and DataSource.parse(str(source)) == source


@pytest.mark.parametrize("text, message", [
    ("advbench:a.csv{columns goal}", "found column 'goal', expected name=column"),
    ("advbench:a.csv{columns =b}", "found column '=b', expected name=column"),
    ("advbench:a.csv{columns goal=a;target=a}", "each name and each column once"),
    ("advbench:a.csv{columns goal=a;goal=b}", "each name and each column once"),
    ("advbench:a.csv{columns goal=a}{columns target=b}", r"found \{columns target=b\}, expected .* each once"),
    ("advbench:a.csv[0:1]{columns goal=a}", "found a slice before the categories or columns"),
    ("advbench:a.csv{column goal=a}", r"found \{column goal=a\}, expected"),
    ("world_refusal@train{columns goal=a}", "found columns, expected none"),
])
def test_wrong_columns(text, message):
    with pytest.raises(ValueError, match=message):
        DataSource.parse(text)


def test_columns_by_other_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,query,reply,output\n1,What?,That.,no\n2,Who?,Me.,no\n")
    source = f"instructions:{path}{{columns instruction=query;output=reply}}"
    examples, (account,) = load(source)
    assert examples == [Example("What?", "", "That."), Example("Who?", "", "Me.")] and account.unread == ("id",)
    assert examples[0].columns == ("query", "input", "reply") and account.source == source
    with pytest.raises(ValueError, match=r"a\.csv, line 2: missing column 'answer'; found columns: id, query, reply"):
        load_examples(f"instructions:{path}{{columns instruction=query;output=answer}}")
    path = tmp_path / "b.jsonl"
    path.write_text(lines({"q": 3, "output": "x"}))
    with pytest.raises(ValueError, match=r"column 'instruction': found 3 .* \(instruction is the file's 'q'\)$"):
        load_examples(f"instructions:{path}{{columns instruction=q}}")


@pytest.mark.parametrize("row, source, message", [
    ({"prompt": "p", "query": "q", "response": "r"}, "instructions:{}{{columns instuction=query}}",
     "column 'query': found it given as 'instuction', which kind 'instructions' does not read of this row"),
    ({"prompt": "p", "query": "q", "chosen": "r", "rejected": "s"}, "preferences:{}{{columns question=query}}",
     r"'question', which kind 'preferences' does not read .* \(here prompt, chosen, rejected\)"),
    ({"chat": [{"role": "user", "content": "a"}], "said": "b"}, "messages:{}{{columns messages=chat;answer=said}}",
     "column 'said': found it given as 'answer'")])
def test_a_column_that_is_named_and_not_read(tmp_path, row, source, message):
    """A slip in a name must not give the file's other column in its place."""
    path = tmp_path / "a.jsonl"
    path.write_text(lines(row))
    with pytest.raises(ValueError, match=message):
        load_examples(source.format(path))


def test_kinds_of_harm_by_another_name(tmp_path):
    """Read where they choose, and by an evaluation where nothing chooses."""
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*({**qa(i), "is_safe": False, "kinds": {"x": i > 0, "y": i == 0}} for i in range(3))))
    source = f"beavertails_unsafe:{path}{{columns category=kinds}}"
    assert len(load_examples(source)) == 3 and len(load_examples(source + "{category=x}")) == 2
    assert {*data.load_categories(source).values()} == {("x",), ("y",)}


def test_agnews_without_a_header(tmp_path):
    """The original's train.csv, and Kaggle's with a header: as fancyzhx/ag_news has them, title and text in one."""
    rows = '"3","Bears, back","Short-sellers\\are ""green"""\n"4","B","c"\n'
    for name, text in (("train.csv", rows), ("kaggle.csv", '"Class Index","Title","Description"\n' + rows)):
        (tmp_path / name).write_text(text)
        examples = load_examples(f"agnews:{tmp_path / name}")
        assert [(e.input, e.output) for e in examples] == [
            ('Bears, back Short-sellers\\are "green"', "Business"), ("B c", "Sci/Tech")]
    (tmp_path / "bad.csv").write_text(rows + '"5","B","c"\n')
    with pytest.raises(ValueError, match=r"bad\.csv, line 3: column 'Class Index': found label '5', expected 1 to 4"):
        load_examples(f"agnews:{tmp_path / 'bad.csv'}")
    (tmp_path / "other.csv").write_text('"5","B","c"\n"1","B","c"\n')
    with pytest.raises(ValueError, match=r"missing column 'label'"):
        load_examples(f"agnews:{tmp_path / 'other.csv'}")


def test_hub_data_is_streamed_where_few_rows_are_needed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls, given_out = [], []

    def rows():
        for i in range(1000):
            given_out.append(i)
            yield qa(i)

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return rows() if kwargs.get("streaming") else datasets.Dataset.from_list([qa(i) for i in range(1000)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    source = "instructions:owner/name:main#v1.0@train"
    assert len(load_examples(f"{source}[0:7]")) == 7 and len(given_out) == 7
    assert len(load_examples(f"{source}[7:]")) == 993
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # what was fetched before is no stream
    assert len(load_examples(f"{source}[0:7]")) == 7
    assert [kwargs.get("streaming", False) for _, kwargs in calls] == [True, False, False]
    assert all(args == ("owner/name", "main") and (kwargs["split"], kwargs["revision"]) == ("train", "v1.0")
               for args, kwargs in calls)


def test_a_data_set_directory_is_streamed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(*(qa(i) for i in range(50))))
    whole = load_examples(f"instructions:{folder}@train")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "none")
    found = load_examples(f"instructions:{folder}@train[2:5]")
    assert found == whole[2:5] and [e.where for e in found] == [e.where for e in whole[2:5]]
    assert re.search(r"\(train\), row 2 \(from 0\)$", found[0].where) and read_rows(folder, "train")[2] == qa(2)
    with pytest.raises(ValueError, match="split 'dev'"):
        load_examples(f"instructions:{folder}@dev[0:1]")


def test_overlaps_by_how_alike():
    sets = {"alignment": ["Hi there", "A  b", "US", "!", "x"], "attack": ["hi THERE", "A b", "us.", "!!", "x"],
            "test": ["other"]}
    found = data.overlaps({name: [Example(text) for text in of] for name, of in sets.items()})
    assert found["alignment", "attack"] == {"exact": 1, "normalised": 3, "unpunctuated": 4}
    assert set(found["alignment", "test"].values()) == {0} and len(found) == 3


def test_overlaps_are_of_every_question_of_a_conversation():
    """As leaks are: what a card calls disjoint, an attack must not refuse."""
    turns = [data.Turn("user", "Hi there"), data.Turn("assistant", "Yes?"), data.Turn("user", "How?")]
    chats, single = [data.conversation([*turns, data.Turn("assistant", "So.")])], [Example("hi there", "", "x")]
    found = data.overlaps({"alignment": single, "attack": chats})["alignment", "attack"]
    assert found == {"exact": 0, "normalised": 1, "unpunctuated": 1}
    with pytest.raises(ValueError, match="found 1 of 1 prompts also in alignment"):
        data.mix(single * 3, chats, 2, 0.5, 0, {"alignment": [data.fingerprint(single[0])]})
