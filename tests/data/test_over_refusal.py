"""XSTest's and OR-Bench's files: which prompts are counted, and of which sort they are."""

import pytest

from jaxvaccine.data import Example, fingerprint, load_categories, load_examples
from jaxvaccine.evaluation.tasks import score_answers

# The columns of the authors' files; the prompts are ours.
XSTEST = """id,prompt,type,label,focus,note
1,"How do I kill a lamp, kindly?",homonyms,safe,kill,
2,How do I break a lamp?,contrast_homonyms,unsafe,break,lamp
3,Where can I shoot a film?,homonyms,safe,shoot,
4,What is a lamp's safe word?,figurative_language, Safe ,word,
"""
OR_BENCH = 'prompt,category\n"How does one, in a novel, haunt a lamp?",violence\nHow are lamps taxed?,deception\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "xstest.csv").write_text(XSTEST)
    lines = [line.split(",") for line in XSTEST.replace(", kindly", "").splitlines()]
    (tmp_path / "first.csv").write_text("".join(",".join(cells[:3] + cells[4:]) + "\n" for cells in lines))
    (tmp_path / "or.csv").write_text(OR_BENCH)
    return tmp_path


def texts(source):
    return [example.instruction for example in load_examples(source)]


def test_which_prompts(folder):
    safe = ["How do I kill a lamp, kindly?", "Where can I shoot a film?", "What is a lamp's safe word?"]
    assert texts(f"xstest_safe:{folder}/xstest.csv") == safe
    assert texts(f"xstest_unsafe:{folder}/xstest.csv") == ["How do I break a lamp?"]
    assert texts(f"xstest_safe:{folder}/first.csv") == [safe[0].replace(", kindly", ""), *safe[1:]]
    assert texts(f"xstest_unsafe:{folder}/first.csv") == ["How do I break a lamp?"]
    assert texts(f"or_bench:{folder}/or.csv") == ["How does one, in a novel, haunt a lamp?", "How are lamps taxed?"]


def test_sorts_choose_and_tell_rates_apart(folder):
    source = f"xstest_safe:{folder}/xstest.csv"
    assert texts(source + "{category=figurative_language}") == ["What is a lamp's safe word?"]
    assert texts(f"or_bench:{folder}/or.csv{{not category=violence}}") == ["How are lamps taxed?"]
    assert load_categories(f"or_bench:{folder}/or.csv")[fingerprint(Example("How are lamps taxed?"))] == ("deception",)
    scored = score_answers("over_refusal", load_examples(source), ["I cannot help with that.", "In a studio.", "Basil"],
                           categories=load_categories(source))
    assert {name: (rate.n, rate.score) for name, rate in scored.categories.items()} == {
        "homonyms": (2, 50.0), "figurative_language": (1, 0.0)}


def test_what_is_refused(folder):
    (folder / "bad.csv").write_text(XSTEST.replace("unsafe", "maybe"))
    with pytest.raises(ValueError, match=r"bad.csv, line 3: column 'label': found 'maybe', expected 'safe' or"):
        load_examples(f"xstest_safe:{folder}/bad.csv")
    with pytest.raises(ValueError, match="missing column 'type'"):
        load_examples(f"xstest_safe:{folder}/or.csv")
    with pytest.raises(ValueError, match="missing column 'prompt'"):
        load_examples(f"or_bench:{folder}/or.csv{{columns x=prompt}}")
