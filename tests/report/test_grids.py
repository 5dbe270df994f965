"""The reports of the named plans, from results that are there already."""

import numpy as np
import pytest
from scipy import stats

from jaxvaccine.experiment import results
from jaxvaccine.experiment.plans import GRIDS, pairs
from jaxvaccine.experiment.run import PlanConfig
from jaxvaccine.report import differences, names
from jaxvaccine.report import runs as reports
from jaxvaccine.report.results import pick
from tests.report.synthetic import frame, rate

BACKBONES, SEEDS = ("world", "other/base"), (0, 1)
MEASURES = ("harmful_score", "sst2", "over_refusal")


def last_step(attack):
    return 200 if "steps=200" in attack else 100


def made_up(found):
    """A table of every cell, with scores drawn by its place."""
    rng = np.random.default_rng(0)
    rows = []
    for backbone in BACKBONES:
        for seed in SEEDS:
            place = {"backbone": backbone, "seed": seed}
            for method in dict.fromkeys(method for method, _ in found):
                rows += [rate(measure, rng.integers(0, 100), method=method, **place) for measure in MEASURES]
            rows += [rate(measure, rng.integers(0, 100), method=method, attack=attack, stage="attack", step=step,
                          **place)
                     for method, attack in found for step in (20, last_step(attack)) for measure in MEASURES]
    return frame(rows)


@pytest.mark.parametrize("name", GRIDS)
def test_report(name, tmp_path, figures):
    config = PlanConfig(run_dir=str(tmp_path), plan=name, model=BACKBONES, seeds=tuple(map(str, SEEDS)))
    panels = config.panels()
    table = made_up(pairs(panels))
    results.write(tmp_path / results.TABLE, table)
    text = reports.write_plan(config)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    assert text.startswith(f"# {GRIDS[name].title}\n") and "Missing" not in text and "Not drawn" not in text
    assert text.count("\n![") == len(panels) == len(figures)
    assert text.count(differences.HEADING) == 1
    before, _, after = text.partition(differences.HEADING)
    after = after.partition("\n## ")[2]
    rows = [line for line in (before + after).splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == sum(1 + sum(len(curve) for curve in panel.curves.values()) for panel in panels)
    # One row by hand: two backbones times two seeds.
    label, curve = next(iter(panels[0].curves.items()))
    point = curve[0]
    of = pick(table, method=point.method, attack=point.attack, step=last_step(point.attack), measure="harmful_score")
    values, means = of["value"].to_numpy(), of.groupby("backbone")["value"].mean()
    half = stats.t.ppf(0.975, 1) * stats.sem(means)
    low = values.mean() - np.hypot(half, (values - of["low"]).mean())
    high = values.mean() + np.hypot(half, (of["high"] - values).mean())
    expected = f"{values.mean():.1f} ± {values.std(ddof=1):.1f} ({max(low, 0):.0f}–{min(high, 100):.0f})"
    assert len(values) == 4
    assert any(expected in row and point.x in row and (names.method(label) in row or not panels[0].xlabel)
               for row in rows)
