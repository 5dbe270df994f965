"""The folder of a run: made, continued, refused."""

import json
import os
import re

import pytest

from jaxvaccine.data.prompts import Example
from jaxvaccine.experiment import runs

FLAGS = {"lam": 5.0, "targets": ("q_proj", "v_proj"), "model": "a/b"}
DATA = {"hashes": {"alignment": "1" * 64, "harmful": "2" * 64}, "dropped": {"alignment": 0}}


def opened(folder, flags=FLAGS, data=DATA, script="align", **options):
    return runs.open_run(folder, script, flags, data, **options)


def test_a_new_run(tmp_path):
    folder = opened(tmp_path / "runs" / "first", operational={"progress": True})
    config = runs.read_config(folder)
    assert os.listdir(folder) == ["config.json"]
    assert config["script"] == "align"
    assert config["flags"] == {**FLAGS, "targets": ["q_proj", "v_proj"]}
    assert config["data"] == DATA and config["operational"] == {"progress": True}
    assert {"python", *runs.PACKAGES} == set(config["versions"])
    assert re.fullmatch(r"\d+\.\d+.*", config["versions"]["jax"])
    assert config["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", config["git_commit"])


def test_an_empty_folder_becomes_one(tmp_path):
    assert opened(tmp_path) == tmp_path and runs.read_config(tmp_path)["flags"]["lam"] == 5.0


def test_a_folder_whose_making_was_killed_becomes_one(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"scr')
    assert runs.read_config(opened(tmp_path))["script"] == "align"


def test_the_same_flags_continue(tmp_path):
    opened(tmp_path, operational={"save_every": 1})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = (tmp_path / "config.json").read_bytes()
    assert opened(tmp_path, operational={"save_every": 2}) == tmp_path
    assert (tmp_path / "config.json").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("change, message", [
    ({"flags": {**FLAGS, "lam": 25.0, "model": "c"}},
     'lam: found 5.0, expected 25.0; model: found "a/b", expected "c"'),
    ({"flags": {**FLAGS, "rho": 2.0}}, "rho: found null, expected 2.0"),
    ({"flags": {"targets": ["q_proj", "v_proj"], "model": "a/b"}}, "lam: found 5.0, expected null"),
    ({"flags": {**FLAGS, "targets": ("q_proj",)}}, 'targets: found ["q_proj", "v_proj"], expected ["q_proj"]'),
    ({"script": "finetune"}, 'script: found "align", expected "finetune"'),
    ({"data": {**DATA, "hashes": {"alignment": "1" * 64, "harmful": "3" * 64}}},
     f'data.hashes.harmful: found "{"2" * 64}", expected "{"3" * 64}"'),
    ({"data": {"hashes": {"alignment": "1" * 64}, "dropped": {"alignment": 0}}},
     f'data.hashes.harmful: found "{"2" * 64}", expected null'),
])
def test_other_flags_or_data_are_refused(tmp_path, change, message):
    opened(tmp_path)
    with pytest.raises(FileExistsError) as error:
        opened(tmp_path, **change)
    assert str(error.value) == (
        f"{tmp_path}: holds a run with other flags or data; choose another folder, or --overwrite to delete it. "
        + message)


def test_a_long_value_is_shortened(tmp_path):
    opened(tmp_path, flags={"text": "a" * 1000})
    with pytest.raises(FileExistsError, match=r"text: found \"a{59}… \(1002 characters\), expected \"b\"$"):
        opened(tmp_path, flags={"text": "b"})


def test_overwrite(tmp_path):
    opened(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "1").write_text("old")
    opened(tmp_path, flags={"lam": 1.0}, overwrite=True)
    assert os.listdir(tmp_path) == ["config.json"]
    assert runs.read_config(tmp_path)["flags"] == {"lam": 1.0}
    opened(tmp_path / "none", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"found files but no config.json, expected a run or an empty folder"):
        opened(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("content, message", [
    (b'{\n  "script": "align",\n  "fla', "config.json, line 3: found malformed JSON"),
    (b"", "config.json, line 1: found malformed JSON"),
    (b"[1]", "config.json: found a JSON list, expected an object"),
    (b'{"script": "\xff"}', "config.json, line 1: found byte 0xff at offset 12, expected UTF-8"),
])
def test_a_malformed_config(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    for read in (runs.read_config, opened):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


@pytest.mark.parametrize("config", [{}, {"script": "align", "flags": None, "data": []}])
def test_the_config_of_another_program(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileExistsError, match=r"lam: found null, expected 5.0"):
        opened(tmp_path)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: not found, expected the folder of a run"):
        runs.read_config(tmp_path / "none")


def test_the_hash_of_examples():
    examples = [Example("a", "", "b"), Example("ü\n", "\ud800", "c")]
    assert re.fullmatch("[0-9a-f]{64}", runs.examples_hash(examples))
    assert runs.examples_hash(examples) == runs.examples_hash(tuple(examples))
    others = [examples[::-1], examples[:1], [], [Example("a", "b", ""), examples[1]], [*examples, Example("")]]
    assert len({runs.examples_hash(rows) for rows in [examples, *others]}) == 6
