import numpy as np
import pytest
from scipy.stats import beta

from jaxvaccine.evaluation.rates import wilson_interval
from jaxvaccine.report import tables
from jaxvaccine.report.statistics import above, estimate, paired
from tests.report.synthetic import frame, rate, row, rows_of


def test_a_table():
    text = tables.table(["a", "b"], [["1", "x | y"], ["2", "two\nlines"]])
    assert text == "| a | b |\n| --- | --- |\n| 1 | x \\| y |\n| 2 | two lines |\n"


@pytest.mark.parametrize("values, expected", [
    ([10.0, 20.0, 60.0], "30.0 ± 26.5 (0–96)"), ([99.0, 100.0], "99.5 ± 0.7 (93–100)"), ([5.0, 5.0], "5.0 ± 0.0 (5–5)"),
    ([50.0], "50.0"), ([], "–"), ([float("nan"), 1.0], "nan"),
])  # fmt: skip
def test_percentages(values, expected):
    assert tables.percent(estimate(values, percent=True)) == expected


def test_ends_that_are_not_the_same_are_not_written_so():
    """Of a thousand prompts."""
    def of(count):
        return estimate([count / 10], True, wilson_interval(count, 1000))

    assert tables.percent(of(1000)) == "100.0 (99.6–100.0)" and tables.percent(of(0)) == "0.0 (0.0–0.4)"
    assert tables.percent(of(500)) == "50.0 (47–53)"
    assert tables.percent(estimate([5.0, 5.0], True)) == "5.0 ± 0.0 (5–5)", "of numbers without prompts"


def test_percentages_of_one_run_and_without_intervals():
    assert tables.percent(estimate([90.0], True, (82.6, 94.5))) == "90.0 (83–94)"
    assert tables.percent(estimate([99.0, 100.0], True), interval=False) == "99.5 ± 0.7"
    assert tables.rate({"score": 90.0, "interval": [82.6, 94.5]}) == "90.0 (83–94)" and tables.rate(None) == "–"


@pytest.mark.parametrize("values, expected", [
    ([0.5, 1.5], "1.00 ± 0.71"), ([12.345], "12.3"), ([1230.0, 1270.0], "1250 ± 28"), ([2.0, 2.0], "2 ± 0"),
    ([12.0, 14.5], "13.2 ± 1.8"), ([1e-7, 3e-7], "2e-07 ± 1.4e-07"), ([], "–"), ([3.0, np.inf], "inf"),
])  # fmt: skip
def test_other_numbers(values, expected):
    with np.errstate(invalid="ignore"):
        assert tables.number(estimate(values)) == expected


def test_cells_go_by_their_measure():
    rows = frame([rate("harmful_score", 90), row("harmful_loss", 1.5), row("harmful_loss", 2.5, seed=1)])
    assert tables.cell(rows, "harmful_score") == "90.0 (83–94)"
    assert tables.cell(rows, "harmful_loss") == "2.00 ± 0.71"
    assert tables.cell(rows, "sst2") == "–"


def test_what_the_numbers_are_over():
    assert tables.spread_note(["world"], [4]).startswith("One run: world, seed 4. ")
    one, several = tables.spread_note(["world"], [0, 1]), tables.spread_note(["a", "b"], [0, 1])
    assert one.startswith("Mean ± standard deviation over seeds (0, 1) of world. ")
    assert "over seeds and prompts of this one backbone, which says nothing about others" in one
    assert several.startswith("Mean ± standard deviation over backbones (a, b) times seeds (0, 1). ")
    assert "95% interval of the mean over backbones, seeds and prompts" in several
    assert "backbones (a, b) with seed 3." in tables.spread_note(["a", "b"], [3])
    assert tables.notes(["world"], [4], "HS") == tables.spread_note(["world"], [4]) + "\n"
    assert "P(HS > 50): the probability that a new seed of this one backbone has HS above 50" in tables.notes(
        ["world"], [0, 1], "HS")
    assert "that a new run, of a new backbone and seed, has not refused above 50" in tables.notes(
        ["a", "b"], [0], "not refused")


def test_differences_and_chances():
    hs = [frame([rate("harmful_score", value, seed=seed) for seed, value in enumerate(values)])
          for values in ((10, 30), (50, 51))]
    assert tables.difference(paired(*hs, percent=True)) == "-30.5 ± 13.4 (-100 to +91)"
    assert tables.difference(paired(hs[0][:1], hs[0][:1], percent=True)) == "+0.0 (-9 to +9)"
    assert tables.difference(None) == tables.chance(above(hs[0][:1])) == "–"
    low, high = beta.ppf([0.025, 0.975], 1.5, 1.5)
    assert tables.chance(above(hs[1])) == f"0.50 ({low:.2f}–{high:.2f}), 1 of 2"
    assert tables.chance_heading("HS") == "P(HS > 50)"


def test_counts_of_runs():
    runs = {("a", 0), ("a", 1), ("b", 0)}
    assert tables.run_count(runs, False) == "3" and tables.run_count(runs, True) == "3 (2)"


def test_dialogues():
    text = tables.dialogues({"How do I\nmoxate?": [("SFT, aligned", "I can't."), ("SFT, attacked", "Sure | go")]})
    assert text.startswith("> How do I moxate?\n\n")
    assert rows_of(text) == [["model", "answer"], ["SFT, aligned", "I can't."], ["SFT, attacked", "Sure \\| go"]]


def test_report_file(tmp_path):
    tables.write_report(tmp_path, "‖a‖\n")
    assert (tmp_path / "report.md").read_bytes() == "‖a‖\n".encode()
