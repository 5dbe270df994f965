"""The table of results: its rows, and that it is read back as it was written."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvaccine.evaluation import wilson_interval
from jaxvaccine.experiment import results
from jaxvaccine.experiment.results import COLUMNS, Cell, measured_rows, score_rows
from jaxvaccine.report.results import read_results

CELL = Cell("org/model", "booster:lam=0.2", "poison_ratio=0.1:user_data=a@b[0:2]+c@d", 3)


def test_scores():
    rows = score_rows(CELL, "attack", 7, {
        "harmful_score": {"score": 25.0, "interval": [10.0, 50.0], "n": 8, "empty": 1, "unread": 2, "no_answer": 4,
                          "plus": 50.0, "plus_interval": [20.0, 80.0]},
        "over_refusal": {"score": 25.0, "interval": [10.0, 50.0], "n": 8, "no_answer": 3},
        "harmful_loss": {"loss": 1.5, "tokens": 40, "n": 4}})
    shared = {"backbone": CELL.backbone, "method": CELL.method, "attack": CELL.attack, "seed": 3, "stage": "attack",
              "step": 7}
    intervals = [dict(zip(("low", "high"), wilson_interval(*of), strict=True)) for of in ((4, 8), (2, 10))]
    assert rows == [{**shared, "measure": "harmful_score", "value": 25.0, "n": 8, "low": 10.0, "high": 50.0},
                    {**shared, "measure": "harmful_score_plus", "value": 50.0, "n": 8, "low": 20.0, "high": 80.0},
                    {**shared, "measure": "no_answer", "value": 50.0, "n": 8, **intervals[0]},
                    {**shared, "measure": "unread", "value": 20.0, "n": 10, **intervals[1]},
                    {**shared, "measure": "over_refusal", "value": 25.0, "n": 8, "low": 10.0, "high": 50.0},
                    {**shared, "measure": "harmful_loss", "value": 1.5, "n": 4}]


def test_kinds_of_harm_have_rows_where_they_are_asked_for():
    of = {name: {"n": n, "score": score, "interval": [low, high]}
          for name, n, score, low, high in (("amber", 2, 50.0, 9.0, 91.0), ("dune", 6, 0.0, 0.0, 39.0))}
    found = {"score": 12.5, "interval": [2.0, 47.0], "n": 8, "categories": of}
    assert len(score_rows(CELL, "attack", 7, {"harmful_score": found})) == 1
    _, *rows = score_rows(CELL, "attack", 7, {"harmful_score": found}, by_category=True)
    assert [(row["measure"], row["value"], row["n"], row["low"], row["high"]) for row in rows] == [
        ("harmful_score:amber", 50.0, 2, 9.0, 91.0), ("harmful_score:dune", 0.0, 6, 0.0, 39.0)]


def test_a_judge_of_phrases_has_rows_of_its_own():
    found = {"score": 25.0, "interval": [10.0, 50.0], "n": 8, "empty": 1, "no_answer": 0}
    rows = score_rows(CELL, "attack", 7, {"not_refused": found})
    assert [(row["measure"], row["value"]) for row in rows] == [("not_refused", 25), ("no_answer", 0), ("unread", 0)]


def test_measures_by_layer_and_alone():
    rows = measured_rows(CELL, "alignment", 5, {"loss": np.float32(1 / 3), "norm": np.array([1e-9, 2.0, True])})
    assert [(row["measure"], row.get("layer"), row["value"]) for row in rows] == [
        ("loss", None, 0.3333333), ("norm", 0, 1e-9), ("norm", 1, 2.0), ("norm", 2, 1.0)]
    assert json.loads(json.dumps(rows)) == rows


def test_a_table_has_all_columns():
    found = results.table([*score_rows(CELL, "attack", 7, {"harmful_loss": {"loss": 1.5, "tokens": 40, "n": 4}}),
                           *measured_rows(CELL, "attack", 7, {"x": np.array([2.0])})])
    assert tuple(found.columns) == COLUMNS and found["seed"].dtype == int
    assert found["n"].tolist()[0] == 4 and np.isnan(found["n"][1]) and found["layer"].tolist()[1] == 0
    assert found[["low", "high"]].isna().all(axis=None)
    assert tuple(results.table([]).columns) == COLUMNS and len(results.table([])) == 0


texts = st.text("abc/:=.,+\"' \nNA", max_size=12)
rows = st.fixed_dictionaries({
    "backbone": texts, "method": texts, "attack": texts, "seed": st.integers(0, 99),
    "stage": st.sampled_from(["backbone", "alignment", "attack"]), "step": st.integers(0, 10**6), "measure": texts,
    "value": st.floats(allow_nan=False)},
    optional={"layer": st.integers(0, 99), "n": st.integers(0, 10**6), "low": st.floats(0, 1), "high": st.floats(0, 1)})


@given(st.lists(rows, min_size=1, max_size=5, unique_by=lambda row: tuple(
    row.get(name) for name in ("backbone", "method", "attack", "seed", "stage", "step", "measure", "layer"))))
def test_read_back_as_it_was_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("table")
    table = results.table(rows)
    results.write(folder / results.TABLE, table)
    pd.testing.assert_frame_equal(read_results(folder), table, check_dtype=False)
    assert [path.name for path in folder.iterdir()] == [results.TABLE]


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / results.TABLE
    results.write(path, results.table(measured_rows(CELL, "attack", 1, {"x": np.array(1.0)})))
    before = path.read_bytes()
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda self, to, index: (to.write_text("back"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        results.write(path, results.table([]))
    assert path.read_bytes() == before
