"""Every value of every recipe against what the papers' authors pass and hard-code, and every value that they have
against the recipes. What differs is in docs/recipes.md with its reason, and nothing else is there."""

import csv
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import pytest

from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.attack_config import goes_on
from tests.report.synthetic import rows_of

DOCS = Path(__file__).parents[2] / "docs"
NONE = "–"
# Columns of the table that are fields of a recipe.
COMMON = {name: name for name in (
    "epochs", "batch_size", "learning_rate", "weight_decay", "warmup_ratio", "schedule", "max_length", "rank",
    "lora_alpha", "dropout", "targets")}
ALIGN = {**COMMON, **{name: name for name in (
    "harmful_batch_size", "adversary", "inner_steps", "inner_learning_rate", "tamper_weight", "retain_weight")},
    "optimizer": "defense", "perturb_aware": "base_defense"}
ATTACK = {**COMMON, "n": "n", "poison_ratio": "poison_ratio", "alternating": "adapter", "optimizer": "defense"}
BOOSTER = {"lamb": "lam", "alpha": "alpha"}
REPNOISE = {"lamb": "noise_weight", "rho": "ascent_weight"}
# A method's own; in the row of an attack they name the aligned model that it attacks.
OWN = {"vaccine": {"rho": "rho"}, "booster": BOOSTER, "booster+lisa": BOOSTER,
       "vaccine+booster": {**BOOSTER, "rho": "rho"}, "repnoise": REPNOISE,
       "t_vaccine": {"rho": "rho", "layers_S": "layers", "interval_J": "sample_every", "probe_every_K": "probe_every"}}
LISA = {"rho": "lisa_rho", "alignment_step": "lisa_alignment_steps", "finetune_step": "lisa_user_steps"}
ROWS = {"harmful_n": "harmful", "probe_examples": "harmful", "guide_data_num": "guide"}
# Passed, and not read by the program for this method.
UNREAD = {("tar", "lamb"), ("tar", "alpha"), ("tar", "rho")}
TEXTS = ("paper", "repository", "commit", "source", "stage", "method", "task", "harmful", "model", "note")
# What the programs call what we call.
NAMES = {"optimizer": {"rep_noise": "repnoise", "smoothAlignment": "booster", "mesfa": "t_vaccine"},
         "perturb_aware": {"True": "vaccine"}, "alternating": {"single_lora": "continue"}}
# Of methods without a row of their own, whose rows they are compared with.
AS = {("lisa", "alignment"): "sft", ("booster+lisa", "alignment"): "booster", ("booster+lisa", "attack"): "lisa"}
SHAPE = ("rank", "lora_alpha", "targets")


def table():
    with (DOCS / "authors_settings.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


TABLE = table()


def methods_of(row):
    for method in recipes.METHODS[row["paper"]]:
        if (method, row["stage"]) != ("none", "alignment") and row["method"] in (
                "", AS.get((method, row["stage"]), method)):
            yield method


def places(row):
    """(task, harmful) pairs that a row is of."""
    tasks = [row["task"]] if row["task"] else recipes.TASKS[row["paper"]] if row["stage"] == "attack" else [""]
    both = (recipes.BEAVERTAILS, recipes.DECODING_TRUST) if row["paper"] == "t_vaccine" else (recipes.BEAVERTAILS,)
    return product(tasks, [row["harmful"]] if row["harmful"] else both)


def ours(paper, method, stage, task, harmful):
    """The recipe, with what it leaves to auto."""
    aligned = recipes.alignment(paper, method, harmful)
    if stage == "alignment":
        return {"base_defense": "sft", **aligned}
    found = {"defense": "none", **recipes.attack(paper, method, task, harmful=harmful)}
    return {**found, "adapter": "continue" if goes_on(
        found.get("adapter", "auto"), aligned["defense"], found["defense"]) else "new"}


def compared(row, method, task, harmful):
    """(column, field or what it is of, our value) of every cell that is filled, or whose emptiness says something."""
    paper, stage = row["paper"], row["stage"]
    found, script = ours(paper, method, stage, task, harmful), row["source"].startswith("script/")
    aligned, rows = recipes.alignment(paper, method, harmful), recipes.rows(paper, method)
    for column, text in row.items():
        if column in TEXTS or (method, column) in UNREAD or (
                not text and not (script and column == "alternating" and stage == "attack")):
            continue
        # A row for one task is about it; one for all is about the others.
        if not row["task"] and any(other["task"] == task and other[column] for other in TABLE
                                   if other["paper"] == paper and not other["source"].startswith("script/")
                                   and other["method"] in ("", method) and other is not row and task):
            continue
        if column in SHAPE and stage == "attack" and found["adapter"] == "continue":
            continue
        if column in ROWS or (column == "n" and stage == "alignment"):
            name = ROWS.get(column, "alignment")
            yield column, f"{name} rows", rows.get(name, NONE)
        elif stage == "attack" and found["defense"] == "lisa" and column in LISA:
            yield column, LISA[column], found[LISA[column]]
        elif column in (fields := ALIGN if stage == "alignment" else ATTACK):
            yield column, fields[column], found[fields[column]]
        elif column in OWN.get(method, ()):
            yield column, OWN[method][column], aligned[OWN[method][column]]
        else:
            raise AssertionError(f"{row['source']}: {column}: nothing of ours is compared with it")


def value(column, text, stage=""):
    """Of a cell, as ours is written."""
    if column == "optimizer" and text in ("normal", "sft"):
        return "sft" if stage == "alignment" else "none"
    if column == "alternating" and not text:
        return "new"
    if column == "targets":
        return shown(text.split())
    try:
        return shown(float(text))
    except ValueError:
        return NAMES.get(column, {}).get(text, text)


def shown(found):
    if isinstance(found, list | tuple):
        return " ".join(sorted(found))
    return f"{found:g}" if isinstance(found, int | float) else str(found)


def differences():
    """{(paper, method, source, setting, theirs, ours)}: of every cell, of every field that no cell is of ("–"), and of
    what an attack on a task without a script has other than on the paper's first."""
    found, covered = set(), set()
    for row in TABLE:
        for method in methods_of(row):
            for task, harmful in places(row):
                for column, field, mine in compared(row, method, task, harmful):
                    covered.add((row["paper"], method, row["stage"], field))
                    theirs = value(column, row[column], row["stage"])
                    if theirs != shown(mine):
                        found.add((row["paper"], method, row["source"], field, theirs, shown(mine)))
    for paper, methods in recipes.METHODS.items():
        for method, task in product(methods, recipes.TASKS[paper]):
            has_script = any(row["task"] == task and row["paper"] == paper and row["source"].startswith("script/")
                             for row in TABLE)
            first = recipes.attack(paper, method, recipes.TASKS[paper][0])
            for stage, recipe in (("alignment", recipes.alignment(paper, method)),
                                  ("attack", recipes.attack(paper, method, task))):
                for field, mine in recipe.items():
                    if (method, stage) != ("none", "alignment") and (paper, method, stage, field) not in covered:
                        found.add((paper, method, NONE, field, NONE, shown(mine)))
                    if stage == "attack" and not has_script and first.get(field) != mine:
                        found.add((paper, method, NONE, f"{field} ({task})", NONE, shown(mine)))
    return found


def listed():
    """The rows of docs/recipes.md's table of differences; paper, method and source may be patterns."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    header, *rows = rows_of(text, "| paper | method | source | setting | theirs | here | why |")
    assert len(header) == 7
    return [tuple(cell.strip("`") for cell in row) for row in rows]


def test_every_difference_is_listed_with_its_reason():
    found, rows = differences(), listed()
    assert rows and all(len(row) == 7 and len(row[6]) > 20 for row in rows)
    matches = {difference: [row for row in rows if difference[3:] == row[3:6] and all(
        map(fnmatchcase, difference[:3], row[:3]))] for difference in found}
    assert [difference for difference, rows in matches.items() if len(rows) != 1] == [], "not listed, or twice"
    assert [row for row in rows if not any(row in of for of in matches.values())] == [], "differs no longer"


def test_the_table_is_of_the_papers_methods_and_says_where_it_is_from():
    commits = {"booster": ("git-disl/Booster", "6421918"), "t_vaccine": ("Lslland/T-Vaccine", "4513750")}
    for row in TABLE:
        assert commits[row["paper"]] == (row["repository"], row["commit"]) and row["source"]
        assert row["stage"] in ("alignment", "attack") and row["task"] in ("", *recipes.TASKS[row["paper"]])
        assert row["method"] in ("", *recipes.METHODS[row["paper"]])
        assert not any("$" in cell for cell in row.values()), "an argument of a script is called so"
    scripts = [row["source"] for row in TABLE if row["source"].startswith("script/")]
    assert len(scripts) == len(set(scripts)) == 82


@pytest.mark.parametrize("paper", recipes.METHODS)
@pytest.mark.parametrize("protocol, adapter", [("one_new", "new"), ("one_continued", "continue")])
def test_one_attack_is_the_same_for_all(paper, protocol, adapter):
    """It is the released one on the paper's own method, but for the adapter; Lisa is a defense, not an attack."""
    for task in recipes.TASKS[paper]:
        found = [{name: value for name, value in recipes.attack(paper, method, task, protocol).items()
                  if name != "defense" and not name.startswith("lisa_")} for method in recipes.METHODS[paper]]
        assert all(each == found[0] for each in found) and found[0]["adapter"] == adapter
        released = recipes.attack(paper, paper, task)
        assert {name: found[0][name] for name in released if name not in SHAPE} == {
            name: value for name, value in released.items() if name not in SHAPE}
        assert set(SHAPE) & set(found[0]) == (set(SHAPE) if adapter == "new" else set())


def test_the_released_attacks_differ():
    """As the papers' tables were made: steps of an attack on n = 1000."""
    def steps(method, task):
        found = recipes.attack("t_vaccine", method, task)
        return found["epochs"] * 1000 / found["batch_size"]

    assert [steps(method, "sst2") for method in ("sft", "t_vaccine", "vaccine", "tar", "none")] == [
        4000, 2000, 2000, 2000, 2000]
    assert [steps(method, "gsm8k") for method in ("sft", "repnoise", "none", "t_vaccine")] == [10000, 5000, 5000, 2000]
