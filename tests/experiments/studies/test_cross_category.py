"""Sorts of harm, aligned on and not, at their smallest, and their table against one counted by hand."""

import math

import pytest

from experiments.studies import cross_category
from experiments.studies.cross_category import OTHER, SAME, CrossCategoryConfig, sides
from jaxvaccine import data
from jaxvaccine.experiment.config import make
from jaxvaccine.report.results import pick, read_results
from tests.experiments import small
from tests.report import synthetic
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def flags(model_dir, root, *more):
    own = [flag for flag in small.FLAGS if "harmful_test" not in flag]
    return (f"--run_dir={root}", f"--model={model_dir}", *own, *small.ATTACK_FLAGS, "--score_steps=1",
            "--harmful_test=world_harmful@test[0:16]", "--sst2_test=world_rating@test[0:4]", "--benign_test=",
            *more)


@pytest.mark.long
def test_end_to_end(model_dir, tmp_path):
    root = tmp_path / "a"
    small.call(cross_category.VERB, *flags(model_dir, root, "--defenses=sft,booster", "--sorts=amber;birch"))
    table = read_results(root)
    tests = data.load_examples("world_harmful@test[0:16]")
    kinds = data.load_categories("world_harmful@test")
    counts = {sort: sum(sort in kinds[data.fingerprint(e)] for e in tests) for sort in data.world.words.SORTS}
    for sort, count in counts.items():
        assert set(pick(table, measure=f"harmful_score:{sort}")["n"]) == ({count} if count else set())
    # The sorts' prompts are all prompts, in every run after every step.
    wide = table[table["measure"].str.startswith("harmful_score") & (table["measure"] != "harmful_score_plus")]
    for _, of in wide.groupby(["method", "attack", "seed", "stage", "step"]):
        whole, parts = pick(of, measure="harmful_score"), of[of["measure"].str.contains(":")]
        assert (parts["value"] * parts["n"]).sum() == pytest.approx(float((whole["value"] * whole["n"]).iloc[0]))
    text = (root / "report.md").read_text()
    assert [row[:2] for row in rows_of(text, "carry over")[1:]] == [
        [method, model] for method in ("SFT", "Booster") for model in (
            "aligned", "attacked, harmful data = the sorts aligned on", "attacked, harmful data = the other sorts")]
    assert "Missing so far" not in text and (root / "plane.png").exists()


def test_the_sources_are_those_of_the_sorts():
    config = make(CrossCategoryConfig, {"run_dir": "r", "defenses": ("sft", "sft+lisa"), "sorts": ("amber;dune",)})
    pairs = config.pairs()
    assert list(pairs.values()) == [(method, attack, "amber;dune") for method in ("sft", "sft+lisa")
                                    for attack in (SAME, OTHER)]
    (method, same), (_, other), (lisa, _), _ = pairs
    aligned = "sft:alignment_data=world_refusal@train{category=amber;dune}+world_benign@train[0:400]:harmful_data="
    assert method == aligned + "world_harmful@harmful{category=amber;dune}" and lisa == f"{method}+lisa"
    assert same == "poison_ratio=0.1:harmful_data=world_harmful@attack{category=amber;dune}"
    assert other == same.replace("{category", "{not category")


def test_sides():
    """Two choices of sorts: means weighted by prompts, counts of different prompts."""
    of = {(f"sft:{sorts}", attack): ("sft", SAME, sorts) for sorts, attack in (("a", "x"), ("b;c", "y"))}
    rows = []
    for sorts, attack, values in (("a", "x", {"a": (10, 1), "b": (40, 2), "c": (70, 2)}),
                                  ("b;c", "y", {"a": (30, 1), "b": (20, 2), "c": (50, 2)})):
        place = {"method": f"sft:{sorts}", "attack": attack, "stage": "attack", "step": 2}
        rows += [synthetic.row(f"harmful_score:{sort}", value, n=n, **place) for sort, (value, n) in values.items()]
        rows += [synthetic.row("sst2", 80 if sorts == "a" else 90, n=7, **place),
                 synthetic.row("budget", 3.0, **place), synthetic.row("loss", 1.0, **place)]
    found = {row["measure"]: row for row in sides(synthetic.frame(rows), of).to_dict("records")}
    assert {measure: (row["value"], row["n"]) for measure, row in found.items() if measure != "budget"} == {
        "harmful_score:sorts aligned on": (pytest.approx((10 + 2 * 20 + 2 * 50) / 5), 5),
        "harmful_score:other sorts": (pytest.approx((2 * 40 + 2 * 70 + 30) / 5), 5), "sst2": (85, 7)}
    assert found["budget"]["value"] == 3 and math.isnan(found["budget"]["n"])
    assert {(row["method"], row["attack"]) for row in found.values()} == {("sft", SAME)}


@pytest.mark.parametrize("flag, expected", [
    ("--sorts=crimson", "crimson"), ("--attack_source=world_harmful@attack", "--attack_source: "),
    ("--sorts=", "--sorts: found")])
def test_flags(model_dir, tmp_path, flag, expected):
    with pytest.raises(SystemExit, match=expected):
        small.call(cross_category.VERB, *flags(model_dir, tmp_path / "a", "--defenses=sft", flag))
