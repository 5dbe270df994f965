"""The command `jaxvaccine data`."""

import dataclasses
import json

import pytest

from jaxvaccine import cli
from jaxvaccine.experiment.config import FieldError, make
from jaxvaccine.experiment.data_card import DataCardConfig, read_card
from jaxvaccine.report import accounts
from tests import tiny
from tests.data import chat_models


def test_a_chat_s_tokens_are_those_of_its_prompt(tmp_path):
    """With the system prompt that a run would have; what has no template is an error of the flag."""
    model = str(chat_models.save_tokenizer("llama3", tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text(
        json.dumps(dataclasses.replace(tiny.CONFIG, vocab_size=1000).to_hugging_face()))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")

    def tokens(**more):
        given = {"sources": f"messages:{tmp_path / 'a.jsonl'}", "model": model, "prompt": "chat", **more}
        (account,) = read_card(make(DataCardConfig, given)).accounts["data"].values()
        return account["tokens"][0]

    assert tokens(system_prompt="Say nothing of it.") > tokens() > 0
    with pytest.raises(FieldError, match=r"^system_prompt: found 'x', expected none, unless --prompt=chat"):
        tokens(system_prompt="x", prompt="plain")
    with pytest.raises(FieldError, match=r"^prompt: found chat, expected alpaca or plain"):
        tokens(model="world")


def test_card(tmp_path, capsys):
    rows = {"a": [("good", "x"), ("good", "y"), ("Bad!", "z"), ("bad", "word " * 400)],
            "b": [("good", "x"), ("bad", "q")]}
    for name, of in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in of))
    with (tmp_path / "b.jsonl").open("a") as f:
        f.write("{\n")
    source, other = (f"instructions:{tmp_path}/{name}.jsonl" for name in "ab")
    cli.main(argv=["data", f"--alignment_data={source}", f"--test_data={other}[0:2]", "--model=world",
                   "--bad_rows=skip", f"{other}"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
             if line.startswith("|")]
    table = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:5]}
    aligned, of_test, bare = table["alignment"], table["test"], table["data"]
    assert (aligned["rows"], aligned["duplicates"], aligned["of them with another answer"]) == ("4", "1", "1")
    assert (aligned["examples"], aligned["different prompts"], aligned["answer cut"]) == ("3", "3", "1")
    assert int(aligned["tokens: fewest / median / most"].split(" / ")[2]) > 400 and of_test["rows"] == "2"
    assert bare["bad rows"] == "1 malformed JSON" and bare["rows"] == "3"
    shared = {tuple(line[:2]): line[2:] for line in lines[7:]}
    assert shared["alignment", "test"] == ["2", "2", "2"]
    assert len(shared) == 3


def test_lengths_of_several_seeds_are_ranges():
    def record(*tokens):
        return {"user": {"a.jsonl": {"rows": 5, "examples": 5, "tokens": list(tokens)}}}

    text = accounts.section(record(3, 4, 9), record(2, 5, 9), record())
    assert "| user | a.jsonl | 5 | 5 | 2 to 3 / 4 to 5 / 9 |" in text
    assert accounts.TOKENS not in accounts.section(record())
