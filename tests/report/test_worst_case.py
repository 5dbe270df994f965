"""The report of a search, of made-up results: every number by hand."""

import json

import numpy as np
import pytest

from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.plans import Settings
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.search import BENIGN, USUAL, Search, SearchPart, plan_root, trials_path
from jaxvaccine.experiment.spaces import Sort
from jaxvaccine.report.worst_case import FIGURES, front, read, worst_case_report
from tests.experiment import small_world
from tests.report.synthetic import rows_of

SORTS = (Sort("rates", ({"learning_rate": ("1e-3", "2e-3")},)), Sort("layers", ({"only_layers": ("0",)},)))
FAST, SLOW, LAYER, LOST = "learning_rate=2e-3", "learning_rate=1e-3", "only_layers=0", "learning_rate=9"
# {attack: {step: (HS, FA)}}, of the search's seed; the others have less HS by the seed times ten.
FOUND = {BENIGN: {1: (0, 80), 2: (0, 90)}, USUAL: {1: (10, 90), 2: (30, 90)}, SLOW: {1: (20, 85), 2: (60, 90)},
         FAST: {1: (100, 50), 2: (90, 82)}, LAYER: {1: (40, 80), 2: (45, 85)}}


@pytest.fixture
def search(tmp_path):
    settings = Settings.same(small_world.ALIGN, {**small_world.ATTACK, "n": 20}, small_world.settings("a").scores)
    search = Search(SearchPart(trials=4, top=2), SORTS, ("a", "b"), (1, 2), (1, 2), settings, tmp_path, True)
    for method in ("sft", "booster"):
        path = trials_path(tmp_path, method)
        path.parent.mkdir(exist_ok=True)
        tried = [("rates", SLOW, ""), ("layers", LAYER, ""), ("rates", FAST, ""), ("rates", LOST, "loss: found nan")]
        if method == "booster":
            tried = [of for of in tried if of[0] != "layers"]
        path.write_text(json.dumps({
            "method": method, "refused": {"layers": "found 7"} if method == "booster" else {}, "trials": [
                {"sort": sort, "space": 0, "values": dict([text.split("=")]), "failed": failed}
                for sort, text, failed in tried]}))
        for backbone, seeds in (("a", (0, 1, 2)), ("b", (1, 2))):
            for seed in seeds:
                write(search, Cell(backbone, method, "", seed), "alignment", {5: (seed, 10)})
                for text, along in FOUND.items():
                    write(search, Cell(backbone, method, text, seed), "attack", {
                        step: (max(0, hs - 10 * seed), fa) for step, (hs, fa) in along.items()})
    return search


def write(search, cell, stage, along):
    path = result_path(plan_root(search, cell.method), cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": [
        {**cell._asdict(), "stage": stage, "step": step, "measure": measure, "value": value, "n": 10,
         "low": max(0, value - 5), "high": min(100, value + 5)}
        for step, (hs, fa) in along.items()
        for measure, value in (("harmful_score", hs), ("sst2", fa), ("over_refusal", 0))]}))


def test_what_is_read(search):
    of = read(search, "sft")
    # The bound is 90% of 90: after its first step the fast attack has lost the user's task.
    assert of.best == {"rates": 90.0, "layers": 45.0}
    assert [each.attack for each in of.again] == [FAST, SLOW] and of.worst is of.again[0]
    np.testing.assert_array_equal(of.worst.hs.values, [80, 70, 80, 70])
    assert of.worst.steps == (2, 2, 2, 2) and of.worst.kept == 4 and of.worst.fa.mean == 82
    np.testing.assert_array_equal(of.usual.hs.values, [20, 10, 20, 10])
    # HS 50 in the search: the fast one after a step of 4 rows, a quarter of them harmful; whatever it lost.
    assert of.reached == {"rates": (1, 1)}
    assert len(of.points) == 6


def test_a_run_without_a_step_within_the_bound_counts_as_not_attacked(search):
    write(search, Cell("b", "sft", FAST, 2), "attack", {1: (100, 50), 2: (100, 50)})
    worst = read(search, "sft").again[0]
    np.testing.assert_array_equal(worst.hs.values, [80, 70, 80, 2])
    assert worst.kept == 3 and worst.steps == (2, 2, 2, 0)


def test_front():
    assert front([(90, 10), (80, 50), (85, 40), (80, 45), (50, 50), (40, 99)]) == [
        (90, 10), (85, 40), (80, 50), (40, 99)]
    assert front([]) == []


def test_report(search, tmp_path):
    text = worst_case_report(search, ["sft", "booster"], tmp_path)
    head, sft, _ = rows_of(text)
    assert sft[head.index("method")] == "SFT" and sft[head.index("trials")] == "4"
    assert sft[head.index("HS % worst case")].startswith("75.0 ± 5.8 (")
    assert sft[head.index("HS % mean of the 2 strongest")].startswith("60.0 ± 5.8")
    assert sft[head.index("runs within the bound")] == "4 of 4"
    assert sft[head.index("attack of the worst case")] == "learning rate = 2e-3"
    assert sft[-3:] == ["2", "1", "1"]
    assert rows_of(text, "## The strongest of every sort") == [
        ["method", "usual", "rates", "layers"], ["SFT", "30", "90", "45"], ["Booster", "30", "90", "–"]]
    assert rows_of(text, "## The fewest steps")[1:] == [["SFT", "1 / 1", "–"], ["Booster", "1 / 1", "–"]]
    assert rows_of(text, "## Sorts that are none")[1:] == [["Booster", "layers", "found 7"]]
    assert "2 trials came to no end" in text and "nan" not in text
    assert all((tmp_path / name).is_file() and name in text for name in FIGURES)
