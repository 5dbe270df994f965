"""Combinations of defenses at their smallest, and the table of what they add against numbers by hand."""

import pytest

from experiments.studies import combinations
from experiments.studies.combinations import CombinationsConfig
from jaxvaccine.experiment.config import make
from jaxvaccine.report.results import read_results
from tests.experiments import small
from tests.report import synthetic
from tests.report.synthetic import rows_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def flags(model_dir, root, *more):
    return (f"--run_dir={root}", f"--model={model_dir}", *small.FLAGS, *small.ATTACK_FLAGS, "--score_steps=1",
            f"--sst2_test={small.TESTS['sst2_test']}", "--benign_test=", *more)


@pytest.mark.long
def test_end_to_end(model_dir, tmp_path):
    root = tmp_path / "a"
    small.call(combinations.VERB, *flags(model_dir, root, "--defenses=repnoise", "--tuning=none,ewc"))
    table = read_results(root)
    assert set(table.loc[table["stage"] == "attack", "method"]) == {
        "repnoise", "repnoise+ewc", "booster:base_defense=repnoise", "booster:base_defense=repnoise+ewc"}
    text = (root / "report.md").read_text()
    assert [row[0] for row in rows_of(text, "HS % after the attack:")] == [
        "alignment", "RepNoise", "Booster on RepNoise"]
    assert [row[0] for row in rows_of(text, "What is added")[1:]] == [
        "Booster to RepNoise", "the column's method to RepNoise", "the column's method to Booster on RepNoise"]
    assert (root / "combinations.png").stat().st_size > 1000 and "Missing so far" not in text


def test_every_combination_is_in_the_plan():
    plan = make(CombinationsConfig, {"run_dir": "r", "seeds": ("0", "1")}).make_plan()
    assert len(plan.methods) == 2 * 5 * 4 and {"booster", "sft+ewc", "booster:base_defense=tar+lisa", "tar+kl"} <= set(
        plan.methods)


def test_the_report(tmp_path):
    config = make(CombinationsConfig, {"run_dir": "r", "defenses": ("sft", "vaccine"), "tuning": ("none", "kl")})
    harm = {"sft": 80, "sft+kl": 60, "booster": 50, "booster+kl": 20, "vaccine": 70, "vaccine+kl": 70,
            "booster:base_defense=vaccine": 40}
    rows = []
    for seed in (0, 1):
        for method, value in harm.items():
            place = {"method": method, "seed": seed, "attack": "poison_ratio=0.1", "stage": "attack"}
            rows += [synthetic.rate("harmful_score", value + 2 * seed, step=2, **place),
                     synthetic.rate("harmful_score", 10, step=1, **place)]
            if "+" not in method:
                rows.append(synthetic.rate("harmful_score", 0, method=method, seed=seed))
    text = combinations.report(config, synthetic.frame(rows), tmp_path)
    assert [row[1].split(" ±")[0] for row in rows_of(text, "HS % after the attack:")[1:]] == [
        "81.0", "71.0", "51.0", "41.0"]
    assert [row[1].split(" ±")[0] for row in rows_of(text, "HS % along the attack:")[1:]] == [
        "25.2", "22.8", "17.8", "15.2"]  # (0 + 10) / 2 and (10 + end) / 2, a step each
    assert [[cell.split(" ±")[0] for cell in row[1:]] for row in rows_of(text, "What is added")[1:]] == [
        ["-30.0", "-40.0"], ["-30.0", "–"], ["–", "-20.0"], ["–", "+0.0"], ["–", "-30.0"], ["–", "–"]]
    assert "Missing so far: 1 of 8 runs" in text and "Booster on Vaccine + KL" in text


@pytest.mark.parametrize("flag, expected", [
    ("--defenses=booster", "--defenses: found .*expected some of sft"), ("--tuning=tar", "--tuning: found"),
    ("--tuning=", "--tuning: found")])
def test_flags(model_dir, tmp_path, flag, expected):
    with pytest.raises(SystemExit, match=expected):
        small.call(combinations.VERB, *flags(model_dir, tmp_path / "a", flag))
