"""The verdicts of the study of regimes, on tables whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from jaxvaccine.experiment.plans import Plan
from jaxvaccine.report import budget, regime, results
from tests.report.synthetic import frame, rate, row, rows_of

ATTACKS = ("poison_ratio=0.1:adapter=new:learning_rate=1e-4", "poison_ratio=0.1:adapter=continue:learning_rate=2e-5")
BACKBONES, SEEDS, STEPS = ("a", "b", "c"), (0, 1, 2), (10, 20, 40)
NEW, CONTINUED = ATTACKS


def table(hs, refusal=lambda method: 1, methods=("sft", "vaccine", "booster"), budgets=(4.0, 0.001)):
    """hs: (method, attack, step) -> HS of every run, give or take a point; budgets: aligned, and of a step."""
    rng, rows = np.random.default_rng(0), []
    for backbone in BACKBONES:
        for seed in SEEDS:
            for method in methods:
                place = {"backbone": backbone, "seed": seed, "method": method}
                rows += [rate("harmful_score", 0, **place), rate("over_refusal", refusal(method), **place),
                         row("budget", budgets[0], **place)]
                for attack in ATTACKS:
                    for step in STEPS:
                        at = {**place, "attack": attack, "stage": "attack", "step": step}
                        rows += [rate("harmful_score", hs(method, attack, step) + rng.integers(-1, 2), **at),
                                 rate("over_refusal", refusal(method), **at), rate("sst2", 99, **at),
                                 row("budget", budgets[1] * step, **at)]
    return frame(rows)


def plan(methods=("sft", "vaccine", "booster")):
    return Plan.product(BACKBONES, methods, ATTACKS, SEEDS, STEPS)


def known(method, attack, step):
    """Booster is below SFT in both, from the middle on; Vaccine above it in one and the same in the other."""
    sft = {10: 20, 20: 60, 40: 90}[step]
    if method == "booster":
        return sft if step == 10 else sft - 50
    return sft + (30 if step == 10 and attack == CONTINUED and method == "vaccine" else 0)


def test_ratios():
    found = budget.ratios(table(known))
    assert {(r.step, round(r.ratio)) for r in found.itertuples()} == {(10, 400), (20, 200), (40, 100)}
    assert budget.text(133.33) == "133 : 1" and budget.text(4000) == "4000 : 1"


def test_places_and_verdicts():
    found = regime.places(table(known), ("sft", "vaccine", "booster"), ATTACKS)
    assert len(found) == 2 * 2 * (len(STEPS) + 1) - 4, "the aligned model has no ratio"
    by_place = {(place.method, place.attack, place.step): place for place in found}
    for (method, attack, step), place in by_place.items():
        expected = known(method, attack, step) - known("sft", attack, step)
        assert place.difference.mean == pytest.approx(expected, abs=1.5)
        assert place.better == (expected < -10) and place.worse == (expected > 10), (method, attack, step)
    text = regime.verdicts(found, ("vaccine", "booster"))
    vaccine, booster = text.splitlines()[:2]
    assert "Booster" in booster and "beats SFT from 200 to 100 : 1" in booster and "worse" not in booster
    assert "beats SFT nowhere from 400 to 100 : 1" in vaccine and "worse than SFT at 1 of 3 places (400 : 1)" in vaccine


def test_one_number_an_attack():
    """By hand: the trapezoids over steps 0, 10, 20, 40 have the weights 5, 10, 15 and 10 of 40."""
    rows = rows_of(regime.along_table(table(known), ("vaccine", "booster"), ATTACKS))
    expected = {("vaccine", NEW): 0, ("booster", NEW): (15 + 10) / 40 * -50, ("vaccine", CONTINUED): 10 / 40 * 30,
                ("booster", CONTINUED): (15 + 10) / 40 * -50}
    assert len(rows) == 1 + len(expected)
    for line, difference in zip(rows[1:], expected.values(), strict=True):
        assert float(line[-1].split()[0]) == pytest.approx(difference, abs=1.5)


@pytest.mark.parametrize("steps, kept", [
    ((25, 50, 100, 150, 200, 300, 400, 500), [25, 50, 100, 200, 300, 500]), ((10, 20, 40), [10, 20, 40]), ((7,), [7])])
def test_steps_whose_labels_stand_apart(steps, kept):
    assert regime._apart(steps) == kept


def test_over_refusal_is_no_win():
    """A method that is below SFT's HS by refusing everything has its pair reported, and does not beat it."""
    found = regime.places(table(known, lambda method: 40 if method == "booster" else 1), ("sft", "booster"), ATTACKS)
    text = regime.verdicts(found, ("booster",))
    assert "beats SFT from" not in text and "with more over-refusal" in text and "+39.0" in text
    rows = rows_of(regime.verdict_table(found, ("booster",)))
    assert [line[2] for line in rows[1:]] == ["0 of 3", "0 of 3"]


def test_no_answer_is_no_refusal():
    """A method that is below SFT's HS for answering with a word of the user's task has that said beside it."""
    silent = table(known)
    more = silent[silent["measure"] == "harmful_score"].assign(measure="no_answer")
    more["value"] = np.where(more["method"] == "booster", 100 - more["value"], 0)
    found = regime.places(pd.concat([silent, more], ignore_index=True), ("sft", "booster"), ATTACKS)
    at = next(place for place in found if (place.attack, place.step) == (NEW, 40))
    assert at.better and at.silence.mean == pytest.approx(60, abs=1.5)
    assert ", and no answer +" in regime.verdicts(found, ("booster",), "not refused")
    header, *lines = rows_of(regime.verdict_table(found, ("booster",), "not refused"))
    assert "largest difference in not refused, points" in header
    there = lines[0][header.index("no answer there, points")]  # at step 20, the first of two where HS is 50 lower
    assert float(there.split()[0]) == pytest.approx(90, abs=1.5)


def test_noise_is_no_verdict():
    """Backbones that differ by more than the methods do."""
    rng = np.random.default_rng(1)
    found = table(lambda method, attack, step: 50 + rng.normal(0, 25) - (8 if method == "booster" else 0))
    places = regime.places(found, ("sft", "booster"), ATTACKS)
    assert sum(place.better for place in places) <= 1


def test_report(tmp_path):
    published = [regime.Published("booster", "continue", [2500, 250], [0.5, 1.5], "published")]
    text = regime.regime_report(table(known), tmp_path, plan(), published)
    assert (tmp_path / regime.FIGURE).stat().st_size > 10_000 and regime.FIGURE in text
    assert not (tmp_path / regime.VARIANTS).exists()
    assert "Missing" not in text and "beats SFT" in text
    more = ("sft", "booster", "booster:lam=1")
    text = regime.regime_report(table(known, methods=more), tmp_path, plan(more))
    assert (tmp_path / regime.VARIANTS).exists() and "Variants" in text


def test_what_is_missing(tmp_path):
    part = table(known)
    part = part[~((part["method"] == "vaccine") & (part["backbone"] == "c"))]
    text = regime.regime_report(part, tmp_path, plan())
    assert "Missing so far: 6 of 54 runs" in text
    nothing = part[part["stage"] != "attack"]
    assert "Missing so far" in regime.regime_report(nothing, tmp_path / ".", plan())


def test_attack_without_a_kind():
    with pytest.raises(ValueError, match="expected adapter=new or adapter=continue"):
        regime.adapter_of("poison_ratio=0.1")


def test_note():
    text = budget.ratio_note(table(known))
    assert text.startswith("Budget ratio") and "100 : 1" in text and "outside of the published" in text
    assert "in the published" not in text and budget.ratio_note(results.pick(table(known), measure="sst2")) == ""
    inside = budget.ratio_note(table(known, budgets=(16.0, 0.001)))
    assert "400 : 1" in inside and "lie as the published experiments do" in inside
