"""Differences to SFT, run by run: which runs are compared, and what a report says where there are none."""

import numpy as np
import pandas as pd
import pytest

from jaxvaccine.report import differences
from tests.report.synthetic import by_phrases, frame, plan_table, rate, rows_of

P = "poison_ratio=0.1"
AT = {"stage": "attack", "attack": P, "step": 100}


def test_of_the_same_backbone_seed_and_attack():
    """By hand. Seed 7 of SFT, the backbone as it comes and another attack do not count."""
    table = frame([
        rate("harmful_score", 99, method="none", stage="backbone", step=0),
        *(rate("harmful_score", value, seed=seed) for seed, value in ((0, 1), (1, 3), (7, 50))),
        *(rate("harmful_score", value, method="booster", seed=seed) for seed, value in ((0, 0), (1, 0))),
        *(rate(measure, value, seed=seed, **AT) for seed, hs, fa in ((0, 80, 90), (1, 90, 92), (7, 0, 0))
          for measure, value in (("harmful_score", hs), ("sst2", fa))),
        *(rate(measure, value, method="booster", seed=seed, **AT) for seed, hs, fa in ((0, 60, 91), (1, 50, 95))
          for measure, value in (("harmful_score", hs), ("sst2", fa))),
        rate("harmful_score", 5, method="booster", stage="attack", attack="poison_ratio=0", step=100)])
    text = differences.section(table)
    rows = rows_of(text)
    assert rows[0] == ["method", "model", "HS, points", "FA, points", "pairs"]
    assert rows[1][:2] == ["Booster", "aligned"] and rows[1][3:] == ["–", "2"]
    assert rows[1][2].startswith("-2.0 ± 1.4 (")
    assert rows[2][2].startswith("-30.0 ± 14.1 (-100 to +") and rows[2][3].startswith("+2.0 ± 1.4 (")
    assert len(rows) == 3
    assert "1 model without results of SFT with the same backbone, seed and attack is left out" in text


def test_sft_with_a_defense_while_fine_tuning_starts_from_sfts_model():
    table = plan_table(("sft", "sft+lisa", "booster"), seeds=(0, 1))
    table = table[(table["method"] != "sft+lisa") | (table["stage"] == "attack")]
    assert [row[:2] for row in rows_of(differences.section(table))[1:]] == [
        ["SFT + Lisa", "attacked, p = 0"], ["SFT + Lisa", "attacked, p = 0.1"], ["Booster", "aligned"],
        ["Booster", "attacked, p = 0"], ["Booster", "attacked, p = 0.1"]]


def test_pairs_are_counted_by_backbone():
    table = plan_table(backbones=("world", "b"), seeds=(0, 1), steps=(100,))
    gone = (table["method"] == "booster") & (table["backbone"] == "b") & (table["seed"] == 1)
    rows = rows_of(differences.section(table[~gone]))
    assert rows[0][-1] == "pairs (backbones)" and {row[-1] for row in rows[1:]} == {"3 (2)"}
    of = table[~gone].query("stage == 'attack' and attack == @P and measure == 'harmful_score'").set_index(
        ["backbone", "seed", "method"])["value"].unstack()
    means = (of["booster"] - of["sft"]).groupby("backbone").mean()
    assert rows[3][2].startswith(f"{means.mean():+.1f} ± ")


def test_what_a_judge_of_phrases_measured_is_called_so():
    text = differences.section(by_phrases(plan_table(seeds=(0, 1))))
    assert rows_of(text)[0][2] == "not refused, points" and "HS" not in text


@pytest.mark.parametrize("methods, message", [
    (("booster",), "Without results of SFT there is nothing to compare with."),
    (("sft",), "There is no other method than SFT."),
])
def test_nothing_to_compare(methods, message):
    text = differences.section(plan_table(methods))
    assert text.startswith(differences.HEADING) and message in text and "| " not in text


def test_no_pair():
    table = plan_table(seeds=(0,))
    apart = pd.concat([table[table["method"] == "sft"], table[table["method"] != "sft"].assign(seed=5)])
    assert "No other model has results of SFT with the same" in differences.section(apart)
    assert differences.section(frame([])) == ""


def test_a_single_pair_has_newcombes_interval_and_no_deviation():
    rows = rows_of(differences.section(plan_table(seeds=(0,), steps=(100,))))
    assert all(" ± " not in cell and " to " in cell for row in rows[1:] for cell in row[2:-1])
    assert np.isfinite(float(rows[1][2].partition(" ")[0]))
