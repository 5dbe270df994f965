"""Model cards: whatever names others gave, Markdown shows them and reads nothing into them."""

import html
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxvaccine.experiment.chain import Link
from jaxvaccine.experiment.export import Evaluation, Exported
from jaxvaccine.report import tables
from jaxvaccine.report.model_card import escaped, model_card, public

markdown_it = pytest.importorskip("markdown_it")
NASTY = "a|b`c`*d*_e_<img src=x onerror=y>[f](http://g)\n# h\n---\n| i | j |\\"


def rendered(text: str) -> str:
    return markdown_it.MarkdownIt("commonmark").enable("table").enable("strikethrough").render(text)


def shown(part: str) -> str:
    """A piece of HTML without a tag, as a reader sees it; another is a failure."""
    assert "<" not in part, part
    return html.unescape(part)


@given(st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t|`*_<>[]()#~&!\\$"), min_size=1))
@example(NASTY)
@example("&lt;b&gt;")
@example("\\|")
@example("x ##")
def test_text_is_shown_as_it_is(text):
    expected = " ".join(text.split())
    (heading,) = re.findall("<h1>(.*?)</h1>", rendered(f"# x{escaped(text)}x"))
    assert shown(heading) == f"x{expected}x"
    cells = re.findall("<td>(.*?)</td>", rendered(tables.table(["a", "b"], [[f"x{escaped(text)}x", "1"]])))
    assert [shown(cell) for cell in cells] == [f"x{expected}x", "1"]


@pytest.mark.parametrize("text, expected", [
    ("messages:/home/somebody/data/a.jsonl[0:5],sst2:stanfordnlp/sst2@train",
     "messages:a.jsonl[0:5],sst2:stanfordnlp/sst2@train"),
    ("messages:~/a.jsonl", "messages:a.jsonl"), ("messages:data/a.jsonl", "messages:data/a.jsonl"),
    ("sst2:s3://bucket/train.jsonl", "sst2:s3://bucket/train.jsonl"), ("/models/llama", "llama")])
def test_folders_of_this_machine_are_left_out(text, expected):
    assert public(text) == expected


def exported(**more) -> Exported:
    flags = {"defense": "booster", "model": NASTY, "lam": 5.0, "alignment_data": f"messages:{NASTY}", "run_dir": "/x"}
    data = {"hashes": {NASTY: "0" * 64}, "accounts": {NASTY: {f"messages:{NASTY}": {"examples": 3}}},
            "inputs": {"model": {"weights": {NASTY: "1" * 64}}}}
    aligned = Link("runs/a", {"script": "align", "flags": flags, "data": data, "versions": {"jax": "1"}})
    rate = {"score": 50.0, "interval": [10.0, 90.0], "n": 4}
    scored = Evaluation("scores", {"flags": {"judge": NASTY, "judge_model": NASTY}, "data": {"accounts": {
        "harmful_score": {NASTY: {}}}}}, {"harmful_score": {**rate, "categories": {NASTY: rate}}})
    return Exported(**{"name": NASTY, "form": "merged", "base": NASTY, "dtype": "bfloat16", "links": (aligned,),
                       "evaluations": (scored,), **more})


def test_nobodys_names_break_a_card():
    text = model_card(exported())
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(front)["base_model"] == NASTY
    page = rendered(body)
    assert re.findall("<h2>(.*?)</h2>", page) == ["How it was made", "Data", "Scores", "Versions"]
    assert not re.search("<(img|em|a|hr|strong)[ >/]", page.replace("<strong>Do", ""))
    rows = [re.findall("<td>(.*?)</td>", row, re.DOTALL) for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL)]
    assert {len(row) for row in rows if row} == {2, 4, 5}
    assert [" ".join(NASTY.split()) in html.unescape(row[0]) for row in rows if len(row) == 5] == [False, True]


def test_an_attacked_model_is_called_that():
    (aligned,) = exported().links
    attacked = Link("runs/b", {"script": "finetune", "flags": {"defense": "none", "poison_ratio": 0.1},
                               "data": {"hashes": {}, "poison_ratio": 0.125}, "versions": {}})
    card = model_card(exported(links=(aligned, attacked), form="adapter", evaluations=()))
    assert "**Do not serve this model.**" in card and "12.5% was harmful" in card and "No evaluation" in card
    assert "library_name: peft" in card
    assert "Do not serve" not in model_card(exported())
