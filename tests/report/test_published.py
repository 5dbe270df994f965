"""A paper's figures beside ours."""

import pandas as pd
import pytest

from experiments.studies.paper_tables import Entry
from jaxvaccine.report import published
from tests.report.synthetic import frame, rate, rows_of

COLUMNS = ("method", "model", "task", "poison_ratio", "n", "setting", "step", "layer", "measure", "value", "source",
           "confidence")
MODELS = ("owner/Llama-2-7b-hf", "world")
P1 = "poison_ratio=0.1"
ENTRIES = (Entry("sft", P1, "sft", "0.1", "sst2", "0.1", "1000"),
           Entry("booster", P1, "booster", "0.1", "sst2", "0.1", "1000"),
           Entry("booster:lam=20", P1, "booster", "20", "sst2", "0.1", "1000", "lam=20"),
           Entry("booster", P1, "booster", "world", "sst2", "0.1", "1000", backbone=1))


def figures(*rows):
    """(method, model, n, setting, measure, value) of rows."""
    nan = float("nan")
    return pd.DataFrame([(method, model, "sst2", "0.1", n, setting, nan, nan, measure, value, "paper", "high")
                         for method, model, n, setting, measure, value in rows], columns=list(COLUMNS))


PUBLISHED = figures(
    ("booster", "Llama-2-7B", "1000", "", "harmful_score", 20.0),
    ("booster", "Llama-2-7B", "1000", "", "accuracy", 90.0),
    ("booster", "Llama-2-7B", "1000", "lam=20", "harmful_score", 5.0),
    ("booster", "Llama-2-7B", "500", "", "harmful_score", 3.0), ("sft", "Gemma-2-9B", "", "", "harmful_score", 64.0))


def table(seeds=(0,)):
    return frame([rate(measure, value, method=entry.method, attack=entry.attack, stage="attack", step=9, seed=seed,
                       backbone=MODELS[entry.backbone])
                  for entry, hs in zip(ENTRIES, (60, 25, 10, 40), strict=True) for seed in seeds
                  for measure, value in (("harmful_score", hs + 2 * seed), ("sst2", 80))])


def comparison(of, faced=None):
    return rows_of(published.comparison(of, ENTRIES, MODELS, PUBLISHED, "2 settings", faced or {}))[1:]


def test_side_by_side():
    rows = {(row[0], row[3], row[4], i // 2): row[5:] for i, row in enumerate(comparison(table()))}
    # Wilson's intervals of 25, 80 and 60 of 100.
    assert rows["Booster", "", "HS", 1] == ["20.00", "25.00", "+5.00", "17.5–34.3", "2 settings", "paper (high)"]
    assert rows["Booster", "", "FA", 1] == ["90.00", "80.00", "−10.00", "71.1–86.7", "2 settings", "paper (high)"]
    assert rows["Booster (lam = 20)", "lam = 20", "HS", 2][:3] == ["5.00", "10.00", "+5.00"]
    # Another model's figure is said to be one.
    assert rows["SFT", "", "HS", 0] == ["64.00", "60.00", "−4.00", "50.2–69.1", "model (Gemma-2-9B); 2 settings",
                                        "paper (high)"]
    assert rows["Booster", "", "HS", 3] == ["20.00", "40.00", "+20.00", "30.9–49.8",
                                            "model (Llama-2-7B); 2 settings", "paper (high)"]
    assert rows["SFT", "", "FA", 0] == ["–", "80.00", "", "71.1–86.7", "", ""]


def test_another_variant_is_another_method():
    """Variants by name share a curve; the curve's figure is not theirs, unless the setting says which."""
    variant = Entry("booster:exact=true", P1, "booster", "exact", "sst2", "0.1", "1000")
    for measure in (published.HS, published.FA):
        assert published.lookup(PUBLISHED, variant, measure, frozenset()).empty
    own = figures(("booster:exact=true", "Llama-2-7B", "1000", "", "harmful_score", 7.0))
    assert published.lookup(own, variant, published.HS, frozenset())["value"].tolist() == [7.0]


def test_another_n_deviates():
    """Where n is the same in the whole table; where it varies, a figure has its own place."""
    other = PUBLISHED.replace({"n": {"1000": "700"}})
    found = rows_of(published.comparison(table(), ENTRIES, MODELS, other, "2 settings", {}))[1:]
    assert found[2][5:7] == ["20.00", "25.00"] and found[2][9] == "n (700); 2 settings"
    assert found[6][9] == "model (Llama-2-7B); n (700); 2 settings"
    assert [row[4] for row in rows_of(published.unmatched(ENTRIES, other))[1:]] == ["500"]
    varied = [*ENTRIES, ENTRIES[1]._replace(n="100")]
    found = rows_of(published.comparison(table(), varied, MODELS, other, "2 settings", {}))[1:]
    assert {row[5] for row in found} == {"–", "64.00"}
    assert len(rows_of(published.unmatched(varied, other))[1:]) == 4


def test_another_task_deviates():
    """In HS; another task's FA says nothing of this one's."""
    other = pd.concat([PUBLISHED.replace({"task": {"sst2": "gsm8k"}}), PUBLISHED.replace({"task": {"sst2": "agnews"}})],
                      ignore_index=True)
    found = rows_of(published.comparison(table(), ENTRIES, MODELS, other, "2 settings", {}))[1:]
    assert found[2][5:7] == ["20.00", "25.00"] and found[2][9] == "task (gsm8k); 2 settings"
    assert {row[5] for row in found if row[4] == "FA"} == {"–"}
    assert "agnews" in published.unmatched(ENTRIES, other)
    varied = [*ENTRIES, ENTRIES[1]._replace(task="gsm8k")]
    found = rows_of(published.comparison(table(), varied, MODELS, other, "2 settings", {}))[1:]
    assert {row[5] for row in found[:-2]} == {"–"} and found[-2][5] == "20.00"


def test_two_seeds_and_gaps():
    two = comparison(table((0, 1)))
    # 25 and 27: Student's interval 26 ± 12.7, and Wilson's, which go 7.6 down and 9.4 up in the mean.
    assert two[2][6:9] == ["26.00", "+6.00", "11.2–41.8"]
    gaps = comparison(table().query("method == 'sft'"))
    assert gaps[2][5:9] == ["20.00", "–", "", ""] and len(gaps) == len(two) == 2 * len(ENTRIES)


def test_the_attack_that_a_row_faced():
    rows = comparison(table(), {("booster", P1): "10 epochs"})
    assert [row[4] for row in rows[:6:2]] == ["–", "10 epochs", "–"]


def test_what_stands_beside_nothing():
    text = published.unmatched(ENTRIES, PUBLISHED)
    assert [row[4] for row in rows_of(text)[1:]] == ["500"] and "without a counterpart" in text
    assert published.unmatched(ENTRIES, PUBLISHED[PUBLISHED["n"] != "500"]) == ""


def test_averages():
    means = figures(("booster", "Llama-2-7B", "average", "", "harmful_score", 30.0))
    rows = rows_of(published.averages(table(), ENTRIES, MODELS, means, "n"))
    assert rows[1] == ["Booster", "HS", "30.00", "17.50 of 2 places"]
    assert published.averages(table(), ENTRIES, MODELS, PUBLISHED, "n") == ""


@pytest.mark.parametrize("model, name, same", [
    ("meta-llama/Llama-2-7b-hf", "Llama-2-7B", True), ("runs/llama-2-7b", "Llama-2-7B", True),
    ("meta-llama/Llama-2-13b-hf", "Llama-2-7B", False), ("Qwen/Qwen2-7B", "Qwen2-7B", True),
    ("world", "Llama-2-7B", False),
    ("google/gemma-2-9b", "Gemma-2-9B", True), ("world", "", False)])
def test_same_model(model, name, same):
    assert published.same_model(model, name) == same


def test_deviations():
    found = published.deviations({"rank": 8, "targets": ["a", "b"], "steps": 150, "rho": 3.0},
                                 {"rank": 8, "targets": ("a", "b"), "rho": 3, "epochs": 20.0, "steps": 0}, "alignment")
    assert found == [["alignment", "epochs", "20", "–"], ["alignment", "steps", "0", "150"]]
