import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data import DATASETS, DataSource, Example, load, load_examples, parse_sources
from jaxvaccine.data.embedded import EMBEDDED, embedded_refusal

few = settings(max_examples=50)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("embedded_refusal@train", DataSource("embedded_refusal", None, "train")),
        ("embedded_refusal@train[0:200]", DataSource("embedded_refusal", None, "train", 0, 200)),
        ("sst2:stanfordnlp/sst2@train[:10]", DataSource("sst2", "stanfordnlp/sst2", "train", None, 10)),
        ("instructions:openai/gsm8k:main@test", DataSource("instructions", "openai/gsm8k:main", "test")),
        ("advbench:a.csv", DataSource("advbench", "a.csv")),
        ("advbench:a.csv[-5:]", DataSource("advbench", "a.csv", None, -5)),
        ("advbench:a.csv@[1:2]", DataSource("advbench", "a.csv", None, 1, 2)),
        ("advbench:/home/me@work/a.csv", DataSource("advbench", "/home/me@work/a.csv")),
        ("advbench:me@home.csv[1:]", DataSource("advbench", "me@home.csv", None, 1)),
        ("beavertails_safe:C:/data/a.jsonl", DataSource("beavertails_safe", "C:/data/a.jsonl")),
        ("  advbench : a b.csv [ 1 : 2 ] ", DataSource("advbench", "a b.csv", None, 1, 2)),
        ("beavertails_safe:PKU/B-T@30k_train", DataSource("beavertails_safe", "PKU/B-T", "30k_train")),
        ("beavertails_unsafe:a.jsonl{category=violence,incitement}[0:5]",
         DataSource("beavertails_unsafe", "a.jsonl", None, 0, 5, ("violence,incitement",))),
        ("beavertails_unsafe:P/B@x { not  category = a ; b,c } [ :5 ]",
         DataSource("beavertails_unsafe", "P/B", "x", None, 5, ("a", "b,c"), True)),
        ("world_refusal@train{category=amber}", DataSource("world_refusal", None, "train", categories=("amber",))),
        ("advbench:a{1}b.csv", DataSource("advbench", "a{1}b.csv")),
    ],
)
def test_parse(text, source):
    assert DataSource.parse(text) == source


bound = st.none() | st.integers(-999, 999)


@few
@given(
    st.sampled_from(sorted(DATASETS)),
    st.from_regex(r"[\w./-]{1,10}(\.jsonl)?", fullmatch=True),
    st.none() | st.from_regex(r"[a-z0-9_]{1,8}", fullmatch=True),
    bound,
    bound,
    st.lists(st.from_regex(r"[a-z_]([\w ,=@:|&/\[\]-]{0,8}[a-z_])?", fullmatch=True), max_size=3, unique=True),
    st.booleans(),
)
def test_parse_reads_what_str_writes(kind, path, split, start, stop, categories, negated):
    source = DataSource(kind, path, split, start, stop, tuple(categories), negated and bool(categories))
    assert DataSource.parse(str(source)) == source
    assert parse_sources(f"{source}, {source}") == (source, source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no kind"),
        (":a.csv", "found no kind"),
        ("embedded_refusal@train,", "data source '': found no kind"),
        ("advbanch:a.csv", "found kind 'advbanch', expected one of advbench, .*embedded_refusal"),
        ("advbench", "found no path, expected kind:path"),
        ("advbench@train", "found no path"),
        ("embedded_refusal", "found split None, expected one of train, harmful, attack, test"),
        ("embedded_benign@harmful", "found split 'harmful', expected one of train, attack, test"),
        ("embedded_refusal:a.csv@train", "found path 'a.csv', expected none"),
        ("advbench:a.csv[a:b]", r"found slice \[a:b\], expected \[start:stop\]"),
        ("advbench:a.csv[5]", r"found slice \[5\]"),
        ("advbench:a.csv[1:2:3]", r"found slice \[1:2:3\]"),
        ("advbench:a.csv[]", r"found slice \[\]"),
        ("advbench:a.csv{harm=a}", r"found \{harm=a\}, expected \{category=name;name\}"),
        ("advbench:a.csv{}", r"found \{\}, expected \{category"),
        ("advbench:a.csv[0:1]{category=a}", "found a slice before the categories"),
        ("advbench:a.csv{category=}", r"found categories \('',\), expected different names"),
        ("advbench:a.csv{category=a;a}", "expected different names"),
        ("world_benign@train{category=amber}", "found categories, expected none: kind 'world_benign' has none"),
        ("embedded_refusal@train{category=amber}", "kind 'embedded_refusal' has none"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(text)


def jsonl(path, prompts, **columns):
    rows = [{"prompt": p, "response": f"answer {i}"} | columns for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_duplicate_prompts_are_dropped_before_the_slice(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["one", "two", "o\u0308ne", "three", " two\n", "four", "\u00f6ne", "one"])
    examples = load_examples(f"instructions:{path}")
    assert [e.instruction for e in examples] == ["one", "two", "o\u0308ne", "three", "four"]
    assert [e.output for e in examples] == [f"answer {i}" for i in (0, 1, 2, 3, 5)]
    first, second = (load_examples(f"instructions:{path}[{s}]") for s in (":2", "2:"))
    assert first + second == examples


def test_rows_as_they_are(tmp_path):
    """Nothing is dropped, a slice is of the kind's rows, and what repeats is counted."""
    path = tmp_path / "a.jsonl"
    rows = [("one", False), ("one", True), ("One", False), ("one", False), ("two", True), ("two", False), ("", False)]
    path.write_text("".join(json.dumps({"prompt": p, "response": f"answer {i}", "is_safe": safe}) + "\n"
                            for i, (p, safe) in enumerate(rows)))
    source = f"beavertails_unsafe:{path}"
    examples, (account,) = load(source, "rows")
    assert [e.output for e in examples] == [f"answer {i}" for i in (0, 2, 3, 5, 6)]
    assert (account.rows, account.left_out, account.duplicates, account.repeated, account.examples) == (7, 2, 0, 1, 5)
    assert [e.output for e in load_examples(f"{source}[1:4]", "rows")] == ["answer 2", "answer 3", "answer 5"]
    assert [e.output for e in load_examples(f"{source}[-2:]", "rows")] == ["answer 5", "answer 6"]
    # Distinct prompts: the second "one" is gone, and "One" from every slice without the first.
    assert [e.output for e in load_examples(source)] == ["answer 0", "answer 2", "answer 5", "answer 6"]
    assert [e.output for e in load_examples(f"{source}[1:4]")] == ["answer 5", "answer 6"]
    with pytest.raises(ValueError, match=r"found stop 6, expected at most 5 examples$"):
        load_examples(f"{source}[0:6]", "rows")
    _, accounts = load(f"{source}[0:2],{source}[2:4]", "rows")
    assert [of.repeated for of in accounts] == [0, 1]


@few
@given(bound, bound)
def test_slices_are_pythons(start, stop):
    everything = embedded_refusal("train")
    n = len(everything)
    start, stop = (None if b is None else b * n // 999 for b in (start, stop))
    source = DataSource("embedded_refusal", None, "train", start, stop)
    if everything[start:stop]:
        assert load_examples(source) == everything[start:stop]
    else:
        with pytest.raises(ValueError, match="found an empty slice"):
            load_examples(source)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ("0:5", "found stop 5, expected at most 4 examples"),
        ("-5:", "found start -5, expected at least -4"),
        ("2:2", "found an empty slice of 4 examples"),
        ("4:", "found an empty slice of 4 examples"),
    ],
)
def test_slices_beyond_the_data(tmp_path, bounds, message):
    path = jsonl(tmp_path / "a.jsonl", "abcd")
    with pytest.raises(ValueError, match=message) as error:
        load_examples(f"instructions:{path}[{bounds}]")
    assert str(path) in str(error.value)


def test_lists_of_sources_are_concatenated(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "ab")
    both = load_examples(f"embedded_benign@test[:3],instructions:{path}")
    assert both == EMBEDDED["embedded_benign"].make("test")[:3] + load_examples(DataSource("instructions", str(path)))
    assert load_examples(parse_sources(f"instructions:{path}")) == both[3:]
    assert both[3] == Example("a", "", "answer 0")


def test_no_rows_of_the_kind(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "ab", is_safe=True)
    with pytest.raises(ValueError, match="found no rows of this kind"):
        load_examples(f"beavertails_unsafe:{path}")


def test_errors_in_a_row_name_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": 7, "response": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: column 'prompt': found 7 \(int\), expected text"):
        load_examples(f"instructions:{path}")
