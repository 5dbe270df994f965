"""The one mean, deviation and interval of all reports, and rank correlations, against scipy and written out."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxvaccine.evaluation.rates import wilson_interval
from jaxvaccine.report import statistics
from tests.report.synthetic import PROMPTS, frame, rate, row

T2 = 4.302652729911275  # the 97.5% point of t with two degrees of freedom


def cell(*by_backbone):
    """Rows of HS: a list of percentages for every backbone, one per seed."""
    return frame([rate("harmful_score", value, backbone=f"b{i}", seed=seed)
                  for i, values in enumerate(by_backbone) for seed, value in enumerate(values)])


cells = st.lists(st.lists(st.integers(0, PROMPTS), min_size=1, max_size=4), min_size=1, max_size=4)


def test_over_seeds_it_is_students():
    values = np.array([10.0, 20.0, 60.0])
    half = T2 * np.std(values, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(statistics.interval(values)[:3], (30, 30 - half, 30 + half))
    np.testing.assert_allclose(statistics.interval(values)[1:3], scipy.stats.t.interval(
        0.95, 2, values.mean(), scipy.stats.sem(values)))
    assert statistics.interval(values, bounds=statistics.PERCENT_BOUNDS)[1:] == (0, pytest.approx(30 + half), "seeds")
    assert statistics.interval([50.0])[0] == 50 and all(map(math.isnan, statistics.interval([50.0])[1:3]))
    assert statistics.interval([50.0]).over == ""


def test_over_backbones_it_is_students_of_their_means():
    """However many seeds each of them has; losses have no interval of their own."""
    rows = frame([row("harmful_loss", value, backbone=backbone, seed=seed) for backbone, values in (
        ("a", (1.0, 2.0, 6.0)), ("b", (4.0,)), ("c", (7.0, 9.0))) for seed, value in enumerate(values)])
    found = statistics.estimate_rows(rows)
    means = np.array([3.0, 4.0, 8.0])
    half = T2 * np.std(means, ddof=1) / np.sqrt(3)
    assert (found.mean, found.over, found.runs) == (5, "backbones", 6)
    assert (found.low, found.high) == (pytest.approx(5 - half), pytest.approx(5 + half))
    assert found.sd == pytest.approx(np.std([1, 2, 6, 4, 7, 9], ddof=1))


def test_the_prompts_are_in_it_by_hand():
    """Two seeds with 100 and 80 of 100: t of one degree of freedom, and the mean of both distances of Wilson's."""
    found = statistics.estimate_rows(cell([100, 80]), percent=True)
    (low_100, high_100), (low_80, high_80) = wilson_interval(100, 100), wilson_interval(80, 100)
    t = 12.706204736174698 * 10
    assert found.low == pytest.approx(max(0, 90 - np.hypot(t, (100 - low_100 + 80 - low_80) / 2)))
    assert found.high == min(100, 90 + np.hypot(t, (high_100 - 100 + high_80 - 80) / 2)) == 100
    same = statistics.estimate_rows(cell([100, 100, 100], [100, 100, 100]), percent=True)
    assert (same.mean, same.sd, same.low, same.high) == (100, 0, pytest.approx(low_100), 100)
    # Without Wilson's interval in the table it is that of n.
    bare = cell([100, 100]).assign(low=np.nan, high=np.nan)
    assert statistics.estimate_rows(bare, percent=True).low == pytest.approx(low_100)


@given(cells, st.randoms(use_true_random=False))
def test_intervals_of_percentages(by_backbone, random):
    rows = cell(*by_backbone)
    found = statistics.estimate_rows(rows, percent=True)
    assert found.mean == pytest.approx(np.mean([np.mean(values) for values in by_backbone]))
    assert 0 <= found.low <= found.mean + 1e-9 and found.mean - 1e-9 <= found.high <= 100
    assert found.high - found.low > 3, "the prompts leave something open, whatever the runs are"
    order = list(range(len(rows)))
    random.shuffle(order)
    again = statistics.estimate_rows(rows.iloc[order], percent=True)
    assert again[1:5] == pytest.approx(found[1:5], nan_ok=True) and again.over == found.over
    # At least as wide as without the prompts, and as without the runs.
    without = statistics.estimate(rows["value"], True, backbones=rows["backbone"])
    if len(rows) > 1:
        assert found.low <= without.low + 1e-9 and found.high >= without.high - 1e-9
    assert found.over == ("backbones" if len(by_backbone) > 1 else "seeds" if len(rows) > 1 else "prompts")


@given(st.integers(0, PROMPTS))
def test_one_run_has_its_own_interval(count):
    found = statistics.estimate_rows(cell([count]), percent=True)
    assert (found.low, found.high) == pytest.approx(wilson_interval(count, PROMPTS), abs=1e-9)
    assert math.isnan(found.sd) and found.over == "prompts"


def test_nothing_to_estimate():
    assert statistics.estimate_rows(frame([])) is None and statistics.estimate([]) is None
    assert math.isnan(statistics.estimate_rows(frame([row("harmful_loss", 2.0)])).low)


def test_differences_are_of_the_same_backbone_and_seed():
    method, sft = cell([40, 60], [50], [70, 90]), cell([20, 30], [10], [60])
    method, sft = method.sample(frac=1, random_state=1), sft.sample(frac=1, random_state=2)
    found = statistics.paired(method, sft, percent=True)
    assert sorted(found.values) == [10, 20, 30, 40] and found.mean == pytest.approx((25 + 40 + 10) / 3)
    assert found.over == "backbones" and -100 <= found.low < found.mean < found.high <= 100
    assert statistics.paired(method, sft.assign(seed=sft["seed"] + 9)) is None
    with pytest.raises(ValueError, match=r"found a second row of backbone b\d, seed \d, expected one"):
        statistics.paired(method, pd.concat([sft, sft]))
    # Losses: Student's t alone.
    loss = [frame([row("harmful_loss", value, seed=seed) for seed, value in enumerate(values)])
            for values in ((1.0, 2.0, 4.0), (0.5, 0.5, 0.5))]
    assert statistics.paired(*loss)[3:5] == pytest.approx(
        scipy.stats.t.interval(0.95, 2, 11 / 6, scipy.stats.sem([0.5, 1.5, 3.5])))


def test_a_single_difference_is_newcombes():
    """56 of 70 and 48 of 80: 0.0524 to 0.3339 (Newcombe, Statistics in Medicine 17, 1998, table II, method 10)."""
    sides = [frame([row("harmful_score", 100 * count / n, n=n, low=low, high=high)])
             for count, n in ((56, 70), (48, 80)) for low, high in [wilson_interval(count, n)]]
    found = statistics.paired(*sides, percent=True)
    assert (found.mean, found.low, found.high) == pytest.approx((20, 5.24, 33.39), abs=0.01)


@given(cells, st.data())
def test_differences(by_backbone, data):
    method = cell(*by_backbone)
    sft = cell(*(data.draw(st.lists(st.integers(0, PROMPTS), min_size=len(values), max_size=len(values)))
                 for values in by_backbone))
    found, back = (statistics.paired(*sides, percent=True) for sides in ((method, sft), (sft, method)))
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))
    assert -100 <= found.low <= found.mean + 1e-9 and found.mean - 1e-9 <= found.high <= 100
    assert found.high - found.low > 3
    assert statistics.paired(method, method, percent=True).mean == 0


def test_the_probability_of_a_high_score_by_hand():
    """Nine of nine on three backbones are three trials, on one backbone nine."""
    found = statistics.above(cell(*[[90, 80, 51]] * 3))
    assert found == (9, 9, 3.5 / 4, pytest.approx(scipy.stats.beta.ppf(0.025, 3.5, 0.5)), 1)
    assert statistics.above(cell([90] * 9))[:3] == (9, 9, 9.5 / 10)
    none = statistics.above(cell(*[[50, 0, 3]] * 3))
    assert none == (0, 9, 0.5 / 4, 0, pytest.approx(scipy.stats.beta.ppf(0.975, 0.5, 3.5))), "50 is not above 50"
    # A third of one backbone, all of another with fewer seeds.
    some = statistics.above(cell([90, 10, 10], [90, 90]))
    assert some[:3] == (3, 5, pytest.approx((4 / 3 + 0.5) / 3)) and 0 < some.low < some.mean < some.high < 1
    assert statistics.above(cell([90])) is None and statistics.above(cell()) is None
    assert statistics.above(cell([30, 40]), threshold=35).count == 1


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (2, 3, 6)).astype(float)
    found = statistics.rank_correlations(x, y)
    np.testing.assert_allclose(found, [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    assert np.isnan(statistics.rank_correlations(np.ones(6), y[0]))
    x[1, 2] = np.nan
    assert np.isnan(statistics.rank_correlations(x, y)).tolist() == [False, True, False]


def test_permutation_p():
    """A relation that all runs share is one piece of evidence: with three layers p is at least 2 in 3!."""
    x = np.tile([1.0, 2.0, 3.0], (50, 1))
    rng = np.random.default_rng(0)
    assert statistics.permutation_p(x, x, rng) == pytest.approx(2 / 6)
    assert statistics.permutation_p(x[:, ::-1], x, rng) == pytest.approx(2 / 6)
    x, y = rng.normal(size=(2, 1, 7))
    expected = scipy.stats.permutation_test(
        (x[0],), lambda x, axis: scipy.stats.spearmanrho(x, y[0], axis=axis).statistic, permutation_type="pairings",
        n_resamples=np.inf)
    found = statistics.permutation_p(x, y, rng)
    assert found == pytest.approx(min(1, expected.pvalue), abs=0.02)
    # Too many orders to go through.
    x, y = rng.normal(size=(2, 1, 12))
    assert statistics.permutation_p(x, x, rng) < 0.001
    assert 0.001 < statistics.permutation_p(x, y, rng) <= 1


def test_permutation_p_written_out():
    """All 24 orders of four layers, exchanged in both runs alike."""
    x, y = np.random.default_rng(3).normal(size=(2, 2, 4))

    def distance(order):
        return abs(np.mean([scipy.stats.spearmanr(a[list(order)], b).statistic for a, b in zip(x, y, strict=True)]))

    orders = list(itertools.permutations(range(4)))
    expected = np.mean([distance(order) >= distance(range(4)) - 1e-12 for order in orders])
    assert statistics.permutation_p(x, y, np.random.default_rng(0)) == pytest.approx(expected)


def test_correlation():
    up = np.tile(np.arange(6.0), (2, 3, 1))
    found = statistics.correlation(up, up)
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.p == pytest.approx(2 / 720) and found.rho.shape == (2, 3) and found.over == "backbones"
    # A run that is missing is no evidence, and neither is one that is constant.
    gone = up.copy()
    gone[1, 2], gone[1, 1] = np.nan, 1
    found = statistics.correlation(up, gone)
    assert np.isnan(found.rho).sum() == 2 and found.mean == pytest.approx(1) and found.p == pytest.approx(2 / 720)
    none = statistics.correlation(up, np.zeros_like(up))
    assert all(map(math.isnan, (none.mean, none.low, none.high, none.p))) and none.over == ""


def test_the_interval_of_a_correlation_is_that_of_all_reports():
    """Three backbones that differ, seeds that do not: the interval is that of three values, not of thirty."""
    up = np.arange(4.0)
    orders = {1.0: up, 0.8: np.array([1.0, 0, 2, 3]), -1.0: up[::-1]}
    y = np.stack([np.tile(orders[rho], (10, 1)) for rho in orders])
    found = statistics.correlation(np.tile(up, (3, 10, 1)), y)
    assert found.rho[:, 0] == pytest.approx(list(orders)) and found.mean == pytest.approx(0.8 / 3)
    half = T2 * np.std(list(orders), ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((-1, min(1, 0.8 / 3 + half)))
    # A single run has none, and one backbone that of its seeds.
    assert math.isnan(statistics.correlation(up[None, None], up[None, None]).low)
    seeds = statistics.correlation(np.tile(up, (1, 3, 1)), np.stack([*orders.values()])[None])
    assert seeds.over == "seeds" and seeds[2:4] == pytest.approx((found.low, found.high))
