"""run.py's table and plot."""

import numpy as np
import pytest

from experiments import reports, run_report


def results(hs, fa, loss=None):
    rates = {"harmful_score": {"score": hs, "interval": [hs - 5, hs + 5]},
             "sst2": {"score": fa, "interval": [fa - 1, fa + 1]}}
    return rates | ({reports.LOSS: {"loss": loss, "tokens": 9, "n": 2}} if loss else {})


def rows(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


def test_one_seed_has_wilson_intervals(tmp_path):
    text = run_report.write_grid_report(tmp_path, "T", results(50.0, 2.0), {
        "sft": {"aligned": [results(10.0, 1.0)], "0.1": [results(90.0, 80.0)]}}, ["4"])
    assert rows(text)[0] == ["defense", "model", "HS %", "FA %"]
    assert rows(text)[2:] == [["none", "as it comes", "50.0 (45–55)", "2.0 (1–3)"],
                              ["sft", "aligned", "10.0 (5–15)", "1.0 (0–2)"],
                              ["sft", "attacked, p = 0.1", "90.0 (85–95)", "80.0 (79–81)"]]
    assert "one seed, 4" in text and "h(w)" not in text
    assert (tmp_path / "report.md").read_text() == text and (tmp_path / "grid.png").stat().st_size > 1000


def test_several_seeds(tmp_path):
    """Mean, sample standard deviation and Student's interval; a defense with fewer seeds so far says so."""
    aligned = [results(hs, 1.0, loss) for hs, loss in ((10.0, 1.0), (20.0, 2.0), (60.0, 6.0))]
    text = run_report.write_grid_report(tmp_path, "T", None, {
        "sft": {"aligned": aligned}, "booster": {"aligned": aligned[:1], "0": [results(3.0, 70.0, 5.0)]},
    }, ["0", "1", "2"])
    half = 4.302653 * np.std([10, 20, 60], ddof=1) / np.sqrt(3)
    assert rows(text)[0] == ["defense", "model", "HS %", "FA %", "h(w)", "seeds"]
    assert rows(text)[2] == ["sft", "aligned", f"30.0 ± 26.5 (0–{min(100, 30 + half):.0f})", "1.0 ± 0.0 (1–1)",
                             "3.00 ± 2.65", "3"]
    assert rows(text)[3:] == [["booster", "aligned", "10.0 (5–15)", "1.0 (0–2)", "1.00", "1"],
                              ["booster", "attacked, p = 0", "3.0 (-2–8)", "70.0 (69–71)", "5.00", "1"]]
    assert "over seeds (0, 1, 2)" in text


def test_a_task_that_some_results_lack(tmp_path):
    partial = {"harmful_score": results(10.0, 1.0)["harmful_score"]}
    text = run_report.write_grid_report(tmp_path, "T", None, {
        "sft": {"aligned": [partial], "0.1": [results(90.0, 80.0)]}}, ["0"])
    assert rows(text)[2] == ["sft", "aligned", "10.0 (5–15)", "–"]


@pytest.mark.parametrize("name", ["report.md", "grid.png"])
def test_writes_over_its_own_earlier_report(tmp_path, name):
    for hs in (10.0, 20.0):
        run_report.write_grid_report(tmp_path, "T", None, {"sft": {"aligned": [results(hs, 1.0)]}}, ["0"])
    assert (tmp_path / name).stat().st_size > 100
