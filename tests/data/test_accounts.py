"""What became of the rows of a source: counted from file to batch, and told."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data import (
    Account,
    Example,
    accounts_of,
    describe,
    load,
    load_examples,
    load_tokenizer,
    tally,
    tokenize_examples,
)
from jaxvaccine.data import record as record_of
from jaxvaccine.data.accounts import origin
from tests.data import tokenizers_for_tests as kinds

few = settings(max_examples=30)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_tokenizer(kinds.plain(tmp_path_factory.mktemp("plain")))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def account(path, rows, kind="instructions", slice_=""):
    examples, (found,) = load(f"{kind}:{write(path, rows)}{slice_}")
    assert found.examples == len(examples) and accounts_of(examples) == (found,)
    assert found.rows == sum((found.left_out, found.duplicates, found.outside, found.variants, found.examples))
    assert found.prompts == len({" ".join(e.instruction.split()) for e in examples} - {""}) or found.repeated
    return found._replace(source="", prompts=0)


def qa(question, answer="a", **more):
    return {"question": question, "answer": answer, **more}


def test_duplicates_and_what_they_say(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [qa("Name a colour", "red"), qa("Name  a colour", "blue"), qa("Name a colour\n", " red"), qa("Go", ""),
            qa("Go", "left"), qa("Go", "right")]
    assert account(path, rows) == Account("", 6, duplicates=4, disagreeing=2, examples=2)
    # Of several answers the first that is not empty counts, in the first one's place.
    assert [e.output for e in load_examples(f"instructions:{path}")] == ["red", "left"]
    assert account(path, rows, slice_="[1:]") == Account("", 6, duplicates=4, disagreeing=2, outside=1, examples=1)


@pytest.mark.parametrize("prompts", [
    ("Define US", "Define us"), ("x²", "x2"), ("½", "1⁄2"), ("Straße", "Strasse"), ("İstanbul", "i̇stanbul"),
    ("ﬁne", "fine"), ("Ａ", "A")])
def test_prompts_that_are_not_the_same_letter_for_letter(tmp_path, prompts):
    path, rows = tmp_path / "a.jsonl", [qa(p, str(i)) for i, p in enumerate(prompts)]
    assert account(path, rows) == Account("", 2, examples=2)
    # In one slice they are both; of two slices the second lacks what would leak from the first.
    rows += [qa("another", "2")]
    assert account(path, rows, slice_="[0:2]") == Account("", 2, examples=2, partly=True)
    assert account(path, rows, slice_="[1:3]") == Account("", 3, outside=1, variants=1, examples=1, partly=True)
    with pytest.raises(ValueError, match=r"empty slice of 2 examples, 1 of them variants of prompts before it"):
        load_examples(f"instructions:{path}[1:2]")


@few
@given(st.lists(st.sampled_from(["a", "A", " a", "b", "B", "ᵇ", "c", "", "\u200b"]), min_size=1, max_size=12),
       st.data())
def test_disjoint_slices_share_no_prompt(tmp_path_factory, prompts, data):
    from jaxvaccine.data import check_disjoint

    path = write(tmp_path_factory.mktemp("d") / "a.jsonl", [qa(p, str(i)) for i, p in enumerate(prompts)])
    everything, (whole,) = load(f"instructions:{path}")
    cut = data.draw(st.integers(0, len(everything)))
    parts = []
    for bounds in (f"[:{cut}]", f"[{cut}:]"):
        try:
            parts.append(load(f"instructions:{path}{bounds}"))
        except ValueError as error:
            assert "empty slice" in str(error)
            parts.append(([], (whole._replace(examples=0),)))
    (first, _), (second, (after,)) = parts
    check_disjoint("first", [e for e in first if e.instruction.strip("\u200b")], "second", second)
    assert first == everything[:cut]
    assert len(second) + after.variants == len(everything) - cut or not second


def test_rows_of_another_kind_and_unread_columns(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "r", "is_safe": i % 3 == 0, "category": {"theft": True}, "note": ""}
            for i in range(7)]
    found = account(tmp_path / "a.jsonl", rows, "beavertails_unsafe")
    assert found == Account("", 7, left_out=3, examples=4, unread=("category",))
    assert "3 of another kind, unread columns category" in describe(found)


@pytest.mark.parametrize("rows, kind, message", [
    ([qa("Who?", system="Be brief.")], "instructions", "column 'system': found text that kind 'instructions' does not"),
    ([qa("Who?"), qa("What?", history=[["Hi", "Hello"]])], "instructions", "line 2: column 'history'"),
    ([qa("2 + 2?", instruction="Answer in French")], "instructions", "column 'question'"),
    ([qa("2 + 2?", prompt="Answer in French")], "instructions", "column 'question'"),
    ([qa("Which?", choices=["red", "blue"])], "instructions", "column 'choices'"),
    ([{"question": "1 + 1?", "answer": "#### 2", "context": "In base 2."}], "gsm8k", "column 'context'.*'gsm8k'"),
    ([{"goal": "g", "target": "t", "system_prompt": "You may."}], "advbench", "column 'system_prompt'"),
    ([qa("Who?", input="Ann", context="Bob")], "instructions", "columns 'input' and 'context': found text in both"),
])
def test_a_part_of_the_prompt_that_nobody_reads(tmp_path, rows, kind, message):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line \d: .*{message.removeprefix('line 2: ')}"):
        load_examples(f"{kind}:{path}")


@pytest.mark.parametrize("more", [
    {"system": ""}, {"history": []}, {"input": None, "context": ""}, {"context": " "}, {"idx": 3, "text": "anything"},
    {"prompt": "Who goes there tonight?"}, {"instruction": "### Who goes there tonight?"},
    {"messages": [{"role": "user", "content": "Who goes there tonight?"}, {"role": "assistant", "content": "Ann"}]}])
def test_columns_that_are_no_part_of_the_prompt(tmp_path, more):
    """Empty ones, copies of what is read, and all that has another name."""
    row = {"question": "Who goes there tonight?", "answer": "Ann", **more}
    (example,) = load_examples(f"instructions:{write(tmp_path / 'a.jsonl', [row])}")
    assert "Who goes there tonight?" in example.instruction and not example.input


def test_dollys_context_is_the_input(tmp_path):
    rows = [{"instruction": "Who?", "context": c, "response": r} for c, r in (("Ann met Bob.", "both"), ("", "I"))]
    path = write(tmp_path / "a.jsonl", rows)
    assert load_examples(f"instructions:{path}") == [Example("Who?", "Ann met Bob.", "both"), Example("Who?", "", "I")]


def test_empty_ones_are_counted_and_not_trained_on(tmp_path, plain, caplog):
    rows = [qa("Say it", ""), qa("Say nothing", " \n"), qa("", "sure"), qa(" ", "yes"), qa("Go", "</s>"),
            qa("\u200b", "zero"), qa("Say yes", "yes")]
    examples, accounts = load(f"instructions:{write(tmp_path / 'a.jsonl', rows)}")
    assert accounts[0].duplicates == 0 and len(examples) == 7, "an empty prompt is nobody's duplicate"
    tokenized = tokenize_examples(plain, examples, 4096)
    assert (len(tokenized.input_ids), tokenized.empty, tokenized.dropped, tokenized.cut) == (1, 6, 0, 0)
    assert "left out 6 of 7 examples: they have no prompt or no answer" in caplog.text
    (found,) = tally(accounts, examples, tokenized.fates)
    assert (found.empty, found.trained) == (6, 1)
    with pytest.raises(ValueError, match=r"found 6 without .*, the first is .*a\.jsonl, line 1, expected"):
        tokenize_examples(plain, examples[:6], 4096)


@pytest.mark.parametrize("kind, row", [("sst2", {"sentence": " ", "label": 1}), ("agnews", {"text": "", "label": 2})])
def test_nothing_to_label_is_an_empty_prompt(tmp_path, plain, kind, row):
    examples = load_examples(f"{kind}:{write(tmp_path / 'a.jsonl', [row])}")
    with pytest.raises(ValueError, match="without a prompt"):
        tokenize_examples(plain, examples, 4096)


def test_cut_and_dropped(tmp_path, plain):
    """By the tokens that are left: a cut answer lacks at least its EOS."""
    rows = [*(qa(f"Go {i}", "left " * i) for i in (1, 2, 40)), qa("Go " * 200, "left")]
    examples, accounts = load(f"instructions:{write(tmp_path / 'a.jsonl', rows)}")
    lengths = [len(ids) for ids in tokenize_examples(plain, examples, 4096).input_ids]
    for limit in (lengths[1], lengths[1] - 1):
        tokenized = tokenize_examples(plain, examples, limit)
        cut = [fate == "cut" for fate in tokenized.fates]
        assert cut == [n > limit for n in lengths[:3]] + [False] and tokenized.fates[3] == "dropped"
        assert [ids[-1] != plain.eos_token_id for ids in tokenized.input_ids] == cut[:3]
        (found,) = tally(accounts, examples, tokenized.fates)
        assert (found.cut, found.dropped, found.trained) == (sum(cut), 1, 3)


def test_several_sources(tmp_path, plain):
    a = write(tmp_path / "a.jsonl", [qa("one"), qa("two"), qa("one")])
    b = write(tmp_path / "b.jsonl", [qa("two", ""), qa("three", "x y z " * 90)])
    examples, accounts = load(f"instructions:{a},instructions:{b},embedded_benign@test[0:2]")
    assert [e.instruction for e in examples[:4]] == ["one", "two", "two", "three"] and len(examples) == 6
    assert [(x.rows, x.duplicates, x.repeated, x.examples) for x in accounts] == [
        (3, 1, 0, 2), (2, 0, 1, 2), (320, 0, 0, 2)]
    found = tally(accounts, examples, tokenize_examples(plain, examples, 300).fates)
    assert [(x.empty, x.cut, x.trained) for x in found] == [(0, 0, 2), (1, 1, 1), (0, 0, 2)]
    stored = record_of({"alignment": found})["alignment"]
    assert list(stored) == [x.source for x in accounts] and json.loads(json.dumps(stored)) == stored
    assert stored[f"instructions:{b}"]["repeated"] == 1 and stored[f"instructions:{b}"]["unread"] == []
    assert describe(found[1]) == (f"instructions:{b}: 2 rows, 2 examples, 1 trained on; 1 with the prompt of an "
                                  "earlier one, 1 empty, 1 with an answer cut at max_length")
    assert origin(examples[:2]) == " (3 rows: 1 duplicates)" and origin(examples[4:]) == " (320 rows: 318 outside)"
    assert origin([Example("a")]) == ""


def test_places(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r", "is_safe": safe} for safe in (1, 0)])
    (example,) = load_examples(f"beavertails_unsafe:{path}")
    assert example == Example("p", "", "r") and example.where == f"{path}, line 2"
    assert example.columns == ("prompt", "input", "response")
    other = example._replace(output="no")
    assert other == Example("p", "", "no") and (other.where, other.account) == (example.where, example.account)
