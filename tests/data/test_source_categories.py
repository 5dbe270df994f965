import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine import data
from jaxvaccine.data import Example, fingerprint, load, load_categories, load_examples, world
from jaxvaccine.data import world_words as words


def row(prompt, safe=False, **category):
    return {"prompt": prompt, "response": "r", "is_safe": safe, "category": category,
            "refusal": f"Question: {prompt} again\nAnswer: No."}


def test_categories(tmp_path):
    path = tmp_path / "rows.json"
    rows = [row("a", self_harm=False, violence=True, theft=True), row("A ", violence=True, lies=True),
            row("b", lies=False),
            row("c", safe=True, lies=True), {**row("d"), "category": None}, {**row("e"), "category": "{'lies': True}"}]
    path.write_text(json.dumps(rows))
    assert load_categories(f"beavertails_unsafe:{path}[1:2]") == {
        fingerprint(Example("a")): ("lies", "theft", "violence")}
    both = load_categories(f"beavertails_with_refusals:{path},beavertails_safe:{path},embedded_harmful@test")
    assert both == {fingerprint(Example("a again")): ("lies", "theft", "violence"),
                    fingerprint(Example("c again")): ("lies",), fingerprint(Example("c")): ("lies",)}


def test_other_formats_have_none(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,is_safe,category\np,r,False,\"{'lies': True}\"\n")
    assert load_categories(f"beavertails_unsafe:{path}") == {}
    with pytest.raises(ValueError, match=r"rows\.csv\{category=lies\}: found no column 'category' with names"):
        load_examples(f"beavertails_unsafe:{path}{{category=lies}}")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_categories(f"beavertails_unsafe:{tmp_path}/none.jsonl")


def test_a_source_chooses_by_category(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [row("one", theft=True), row("one", theft=False, violence=True), row("two", violence=True, theft=True),
            row("ONE", lies=True), row("three", lies=True), row("four"), row("five", safe=True, violence=True)]
    path.write_text("".join(json.dumps({**r, "response": str(i)}) + "\n" for i, r in enumerate(rows)))
    source = f"beavertails_unsafe:{path}"

    def answers(chosen, protocol="distinct"):
        return [int(e.output) for e in load_examples(f"{source}{chosen}", protocol)]

    # The answer is that of a row which has the category, though another row of the prompt comes first.
    assert answers("{category=violence}") == [1, 2] and answers("{category=theft}") == [0, 2]
    assert answers("{category=violence;lies}") == [1, 2, 3, 4]
    assert answers("{category=violence;lies}[1:3]") == [2] and answers("{category=violence;lies}[-1:]") == [4]
    # "one" is violent in one of its rows, and "ONE" is the same prompt by the measure of leaks.
    assert answers("{not category=violence}") == [4, 5] and answers("{not category=theft;lies}") == [5]
    assert answers("{not category=violence}", "rows") == [0, 3, 4, 5]
    assert answers("{category=violence}", "rows") == [1, 2]
    _, (account,) = load(f"{source}{{not category=violence}}[1:]")
    assert (account.rows, account.left_out, account.other_category) == (7, 1, 4)
    assert (account.outside, account.examples) == (1, 1)
    assert account.unread == ("refusal",) and load(source)[1][0].unread == ("category", "refusal")
    assert "4 of another category" in data.describe(account)
    with pytest.raises(ValueError, match=r"found category 'arson', expected one of lies; theft; violence$"):
        load_examples(f"{source}{{category=arson}}")
    with pytest.raises(ValueError, match="found no rows of these categories"):
        load_examples(f"beavertails_safe:{path}{{not category=violence}}")


KINDS_OF_HARM = ("a", "b,c", "d")
harmful_rows = st.lists(st.tuples(st.sampled_from(["x", "X", " x ", "y", "Y", "z", "w", "5²", "52", ""]),
                                  st.frozensets(st.sampled_from(KINDS_OF_HARM))), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"


def loaded(file, chosen, protocol):
    try:
        return load_examples(f"beavertails_unsafe:{file}{chosen}", protocol)
    except ValueError as error:
        assert re.search("found no rows of these categories|empty slice|expected at most|without a prompt", str(error))
        return []


@settings(max_examples=60)
@given(harmful_rows, st.lists(st.sampled_from(KINDS_OF_HARM), min_size=1, unique=True), st.integers(0, 6))
def test_a_choice_and_its_negation(file, rows, chosen, cut):
    """They share no prompt, have all of them together, and neither do disjoint slices of them share any."""
    file.write_text("".join(json.dumps({**row(prompt, **{name: name in of for name in KINDS_OF_HARM}),
                                        "response": str(i)}) + "\n" for i, (prompt, of) in enumerate(rows)))
    names = ";".join(chosen)
    sides = [loaded(file, f"{{{negation}category={names}}}", "rows") for negation in ("", "not ")]
    numbers = [{int(e.output) for e in side} for side in sides]
    assert numbers[0] == {i for i, (_, of) in enumerate(rows) if of & set(chosen)}
    assert numbers[0] | numbers[1] == set(range(len(rows))) and not numbers[0] & numbers[1]
    prints = [{fingerprint(e) for e in loaded(file, f"{{{negation}category={names}}}", "distinct") if e.instruction}
              for negation in ("", "not ")]
    everything = {fingerprint(Example(prompt)) for prompt, _ in rows if prompt}
    assert not prints[0] & prints[1] and prints[0] | prints[1] == everything
    for negation in ("", "not "):
        slices = [{fingerprint(e) for e in loaded(file, f"{{{negation}category={names}}}{bounds}", "distinct")
                   if e.instruction} for bounds in (f"[0:{cut}]", f"[{cut}:]")]
        assert not slices[0] & slices[1]


def test_sorts_of_the_small_world():
    """Of every kind and split the four sorts are parts, of three verbs each; the judge's reports tell them apart."""
    assert sorted(verb for of in words.SORTS.values() for verb in of) == sorted(words.FORBIDDEN)
    assert {len(of) for of in words.SORTS.values()} == {3} and not set(words.SORTS) & set(world.vocabulary())
    for kind in ("world_refusal", "world_harmful"):
        for split in world.FORBIDDEN_SPLITS:
            everything = world.WORLD[kind].make(split)
            parts = {sort: load_examples(f"{kind}@{split}{{category={sort}}}") for sort in words.SORTS}
            assert sorted(e for part in parts.values() for e in part) == sorted(everything)
            for sort, part in parts.items():
                assert {word for e in part for word in e.instruction.split()} & set(words.FORBIDDEN) == set(
                    words.SORTS[sort])
                assert part == [e for e in everything if e in set(part)], "in the order that there is"
                assert load_examples(f"{kind}@{split}{{not category={sort}}}") == [
                    e for e in everything if e not in set(part)]
    found = load_categories("world_harmful@test[0:4],world_benign@test")
    assert len(found) == len(world.world_harmful("test")) and set(found.values()) == {(sort,) for sort in words.SORTS}
    with pytest.raises(ValueError, match="found category 'jade', expected one of amber; birch; cobalt; dune"):
        load_examples("world_harmful@test{category=jade}")
