"""What docs/design.md says of adding a defense, a data set, a judge, an attack and a study: done to a copy of the
package, file by file, and run there."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from jaxvaccine import data
from jaxvaccine.experiment import methods, recipes
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.run import PlanConfig, make_settings
from tests import markdown
from tests.markdown import ROOT

DESIGN = ROOT / "docs" / "design.md"
HEADING = re.compile(r"# (?P<path>[\w/]+\.py)(?P<new> \(new\))?\n")
RUN = {
    "model": "world", "defenses": "random_booster:lam=0.5", "judge": "sentences", "lam": None,
    "attacks": "poison_ratio=0.5:n=8:defense=leave:leave_weight=0.25,poison_ratio=1.0:n=4:adapter=new",
    "steps": 2, "batch_size": 2, "harmful_batch_size": 2, "attack_steps": 2, "attack_batch_size": 2, "save_every": 0,
    "max_new_tokens": 3, "sst2_test": "", "benign_test": "", "loss_data": "", "score_base": "false",
    "progress": "false"}
STUDY = {"defenses": "sft", "seeds": "0,1", "steps": 2, "measure_every": 1, "attack_steps": 1, "score_steps": "1",
         "attacks": "poison_ratio=0.5:n=8", "batch_size": 2, "attack_batch_size": 2, "max_new_tokens": 1,
         "harmful_test": "world_harmful@test[0:2]", "sst2_test": "", "benign_test": "", "loss_data": "",
         "progress": "false"}


def additions():
    """[(file, whether it is new, text)] of design.md, in order."""
    found = []
    for block in markdown.python_blocks(DESIGN):
        heading = HEADING.match(block)
        assert heading, f"design.md: found a block that names no file: {block[:60]!r}"
        found.append((heading["path"], bool(heading["new"]), block[heading.end():]))
    (defense,) = markdown.python_blocks(ROOT / "docs" / "methods.md")
    return [("jaxvaccine/defenses/random_booster.py", True, defense), *found]


def flags(values):
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A folder with a copy of the package that has all five, and what they left: runs/plan and runs/study."""
    root = tmp_path_factory.mktemp("extended")
    for room in ("jaxvaccine", "experiments"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for path, new, text in additions():
        file = root / path
        assert file.exists() != new, f"{path}: design.md takes it for {'new' if new else 'there'}"
        file.parent.mkdir(exist_ok=True)
        # As a new room of the package has it.
        (file.parent / "__init__.py").touch()
        with file.open("a", encoding="utf-8") as opened:
            opened.write(text)
    rows = [{"instruction": example.instruction, "context": "", "response": example.output}
            for example in data.load_examples("world_harmful@test[0:3]")]
    (root / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plan = flags({**RUN, "run_dir": "runs/plan", "harmful_test": "dolly:dolly.jsonl[0:2]"})
    study = flags({**STUDY, "run_dir": "runs/study"})
    program = f"""
from experiments.studies import adapter_norm
from jaxvaccine import cli
cli.main("align", ["--help"])
cli.main("finetune", ["--help"])
print("END OF HELP")
cli.main("run", {plan})
cli.call("adapter_norm", adapter_norm.VERB, {study})
"""
    # XLA without most of its optimizations compiles in half the time.
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "help.txt").write_text(done.stdout.partition("END OF HELP")[0], encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def cell(extended):
    """The folder of the one method and seed of runs/plan."""
    return extended / "runs" / "plan" / "world" / "random_booster_lam=0.5" / "seed0"


def last_line(path):
    return json.loads(Path(path).read_text(encoding="utf-8").splitlines()[-1])


def test_files():
    """At most one file that exists for each, so two with a recipe or a base."""
    sections = re.split(r"^### \(\w\) ", DESIGN.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert [re.match(r"\w+( \w+)?", section)[0] for section in sections] == [
        "Defense", "Data set", "Judge", "Attack", "Study"]
    old = [path for path, new, _ in additions() if not new]
    assert sorted(old) == ["jaxvaccine/data/kinds.py", "jaxvaccine/experiment/judging.py",
                           "jaxvaccine/experiment/methods.py", "jaxvaccine/experiment/methods.py"]


@pytest.mark.long
def test_defense(cell):
    config = json.loads((cell / "aligned" / "config.json").read_text())
    assert config["flags"]["defense"] == "random_booster"
    assert (config["flags"]["lam"], config["flags"]["alpha"]) == (0.5, 0.1)
    assert set(config["data"]["hashes"]) == {"alignment", "harmful"}
    assert {"loss", "harmful_loss"} <= set(last_line(cell / "aligned" / "metrics.jsonl"))


def test_a_defense_without_a_recipe(monkeypatch):
    """It takes nothing from those that have one, and says so when its own is asked for."""
    monkeypatch.setitem(methods.ALIGNMENT, "mine", methods.Sft)
    config = PlanConfig(run_dir="-", model=("-",), defenses=("booster",), recipe="booster")
    tests = {"harmful_test": "world_harmful@test"}
    assert make_settings(config, {}, {}, tests).align["booster"] == recipes.alignment("booster", "booster")
    with pytest.raises(FieldError, match=r"recipe: found 'booster', expected another: booster's has no mine"):
        make_settings(dataclasses.replace(config, defenses=("booster", "mine:steps=3")), {}, {}, tests)


@pytest.mark.long
def test_data_set_and_judge(cell):
    """The prompts are the file's, and the judge is asked about answers alone."""
    folders = list(cell.glob("*-scores"))
    assert len(folders) == 3
    for folder in folders:
        lines = (folder / "predictions_harmful_score.jsonl").read_text(encoding="utf-8").splitlines()
        predictions = [json.loads(line) for line in lines]
        assert [p["prompt"] for p in predictions] == [
            example.instruction for example in data.load_examples("world_harmful@test[0:2]")]
        for p in predictions:
            short = len(p["answer"].split()) < 2 and p["answer"] != "sorry"
            assert (p["verdict"], p["reason"]) in ([("no answer", "one word"), ("no answer", "empty answer"),
                                                    ("no answer", "answer to the user's task")] if short else
                                                   [("refused", "one sentence"), ("refused", "sorry")])


@pytest.mark.long
def test_attacks(cell):
    """An objective, and a text alone."""
    objective, text = (next(path for path in cell.glob(f"poison_ratio={start}*") if (path / "adapter").exists())
                       for start in ("0.5", "1.0"))
    config = json.loads((objective / "config.json").read_text())["flags"]
    assert (config["defense"], config["leave_weight"], config["adapter"]) == ("leave", 0.25, "continue")
    config = json.loads((text / "config.json").read_text())["flags"]
    assert (config["defense"], config["n"], config["adapter"]) == ("none", 4, "new")
    results = pd.read_csv(cell.parents[2] / "results.csv", keep_default_na=False)
    assert set(results["attack"]) == {"", *RUN["attacks"].split(",")}


@pytest.mark.long
def test_study(extended):
    results = pd.read_csv(extended / "runs" / "study" / "results.csv")
    norms = results[results["measure"] == "adapter_norm"]
    assert set(zip(norms["seed"], norms["step"], strict=True)) == {(seed, step) for seed in (0, 1) for step in range(3)}
    assert (norms["value"] > 0).all()
    report = (extended / "runs" / "study" / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# The adapter's length") and (extended / "runs" / "study" / "curves.png").exists()


@pytest.mark.long
def test_help(extended):
    """The new names and flags are in what --help says."""
    said = (extended / "help.txt").read_text(encoding="utf-8")
    assert "|random_booster" in said and "Booster with a random direction (with random_booster)" in said
    assert "|leave" in said and "--leave_weight=X" in said


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed")
@pytest.mark.long
def test_no_rule_is_broken(extended):
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=extended, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(extended)})
    assert done.returncode == 0, done.stdout[-3000:]
