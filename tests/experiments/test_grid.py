"""The experiment grid at its smallest setting, and what its reports say."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from experiments import common, grid, grid_report, panels, presets, sweep
from experiments.align import AlignConfig
from experiments.finetune import FinetuneConfig
from experiments.grid_report import Attack
from experiments.sweep_report import folder_name
from jaxvaccine import data

ALIGN = AlignConfig(**presets.WORLD_ALIGN, run_dir="-", model="-")
ATTACK = FinetuneConfig(**presets.WORLD_ATTACK, run_dir="-", aligned="-")


@pytest.mark.parametrize("name", panels.GRIDS)
def test_every_cell_is_a_valid_setting(name):
    found = panels.cells(panels.GRIDS[name].panels(panels.METHODS))
    assert len(found) == len(set(found))
    methods = [method for method, _ in found]
    assert methods == sorted(methods, key=methods.index), "the cells of a method are not together"
    settings = set()
    for method, attack in found:
        aligned = sweep.variant(ALIGN, method, "methods", "defense")
        attacked = sweep.variant(ATTACK, attack, "attacks").resolve(dataclasses.asdict(aligned))
        data.poison(common.load_sources(attacked.user_data), common.load_sources(attacked.harmful_data), attacked.n,
                    attacked.poison_ratio, 0)  # raises if there is not enough of either
        settings.add((aligned, attacked))
    assert len(settings) == len(found), "the same setting has several names"


def made_up_cells(root, bases, found):
    """A file for every cell, with scores drawn by its place."""
    rng = np.random.default_rng(0)
    for base in bases:
        for method, attack in found:
            steps = ("0", "20", "200" if "steps=200" in attack else "100")
            scores = {step: {task: rng.integers(0, 100, 2).astype(float).tolist()
                             for task in ("harmful_score", "sst2", "over_refusal")} for step in steps}
            path = root / folder_name(base) / folder_name(method) / f"{folder_name(attack)}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"scores": scores}))


@pytest.mark.parametrize("name", panels.GRIDS)
def test_report(name, tmp_path, monkeypatch):
    """From cells that are there already."""
    monkeypatch.setattr(sweep, "carry_out", lambda config, align, attack, pairs: None)
    bases = ("world", "other/base")
    config = grid.GridConfig(run_dir=str(tmp_path), grid=name, bases=bases, seeds=("0", "1"))
    found = panels.GRIDS[name].panels(config.methods)
    made_up_cells(tmp_path, bases, panels.cells(found))
    report = grid.grid(config, ALIGN, ATTACK)
    assert (tmp_path / name / "report.md").read_text(encoding="utf-8") == report
    plots = [line for line in report.splitlines() if line.startswith("![")]
    assert len(plots) == len(found) == len(list((tmp_path / name).glob("*.png")))
    rows = [line for line in report.splitlines() if line.startswith("| ") and "---" not in line]
    shown = found[:-1] if name == "worst_case" else found
    assert len(rows) == sum(1 + sum(len(curve) for curve in panel.curves.values()) for panel in shown) + (
        1 + len(config.methods) if name == "worst_case" else 0)
    # One row by hand.
    panel = shown[0]
    label, curve = next(iter(panel.curves.items()))
    cells = [json.loads((tmp_path / folder_name(base) / folder_name(curve[0].method)
                         / f"{folder_name(curve[0].attack)}.json").read_text())["scores"] for base in bases]
    last = max(cells[0], key=int)
    values = np.array([score for cell in cells for score in cell[last]["harmful_score"]])
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    expected = f"{values.mean():.1f} ± {values.std(ddof=1):.1f} ({max(low, 0):.0f}–{min(high, 100):.0f})"
    assert any(expected in row and (label in row or curve[0].x in row) for row in rows)


def test_scores_of_a_point():
    def cell(*harmful):
        return {"scores": {step: {"harmful_score": [hs], "sst2": [fa], "over_refusal": [refused]}
                           for step, hs, fa, refused in zip(("0", "10", "40"), harmful, (1, 2, 3), (4, 5, 6),
                                                            strict=True)}}

    found = grid_report.scores_of([cell(0.0, 20.0, 80.0), cell(10.0, 10.0, 10.0)])
    # (10 · (0 + 20) / 2 + 30 · (20 + 80) / 2) / 40
    np.testing.assert_allclose(found.along, [40.0, 10.0])
    for values, expected in ((found.aligned, [0, 10]), (found.end, [80, 10]), (found.accuracy, [3, 3]),
                             (found.over_refusal, [4, 4])):
        np.testing.assert_array_equal(values, expected)


def test_the_worst_case_serves_the_user():
    def attack(setting, step, hs, fa):
        return Attack(setting, step, np.array([hs - 10.0, hs + 10.0]), np.array([fa, fa]))

    attacks = [attack("slow", 50, 30, 99), attack("slow", 100, 70, 98), attack("slow", 200, 70, 100),
               attack("fast", 100, 95, 97), attack("nothing", 0, 0, 100)]
    assert grid_report.worst_case(attacks) == attacks[1]  # fast is out for its FA, 200 steps are no worse than 100
    assert grid_report.fewest_steps(attacks) == 100
    assert grid_report.fewest_steps(attacks[:1]) is None


def test_intervals():
    assert grid_report.summary(np.array([50.0])) == "50.0"
    assert grid_report.summary(np.array([99.0, 100.0])) == "99.5 ± 0.7 (93–100)"
