"""The one mean, deviation and interval of all reports, and rank correlations, against scipy and written out."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxvaccine.report import statistics
from tests.report.synthetic import frame, rate, row

percentages = st.lists(st.floats(0, 100), min_size=1, max_size=12)


def test_interval_is_students():
    values = np.array([10.0, 20.0, 60.0])
    half = 4.302652729911275 * np.std(values, ddof=1) / np.sqrt(3)  # the 97.5% point of t with two degrees of freedom
    np.testing.assert_allclose(statistics.interval(values), (30 - half, 30 + half))
    np.testing.assert_allclose(statistics.interval(values), scipy.stats.t.interval(
        0.95, 2, values.mean(), scipy.stats.sem(values)))
    assert statistics.interval(values, statistics.PERCENT_BOUNDS) == (0.0, pytest.approx(30 + half))
    assert statistics.interval(np.array([7.0, 7.0, 7.0])) == (7, 7)
    assert all(map(math.isnan, statistics.interval(np.array([50.0]))))


@given(percentages)
def test_estimates(values):
    found = statistics.estimate(values, percent=True)
    assert found.runs == len(values) and found.mean == pytest.approx(np.mean(values))
    if len(values) == 1:
        assert all(map(math.isnan, (found.sd, found.low, found.high)))
    else:
        assert found.sd == pytest.approx(np.std(values, ddof=1))
        assert -1e-9 <= found.low <= found.mean + 1e-9 and found.mean - 1e-9 <= found.high <= 100 + 1e-9


def test_a_single_run_has_its_own_interval():
    one = frame([rate("harmful_score", 90.0)])
    found = statistics.estimate_rows(one, percent=True)
    # Wilson's of 90 of 100.
    assert (found.low, found.high) == (pytest.approx(82.56, abs=0.01), pytest.approx(94.48, abs=0.01))
    assert statistics.estimate_rows(frame([])) is None and statistics.estimate([]) is None
    assert math.isnan(statistics.estimate_rows(frame([row("harmful_loss", 2.0)])).low)
    # Of two runs it is Student's, whatever their own are.
    two = statistics.estimate_rows(frame([rate("harmful_score", 99.0), rate("harmful_score", 100.0, seed=1)]), True)
    assert (two.mean, two.high) == (99.5, 100) and two.low == pytest.approx(99.5 - 12.7062 * 0.5, abs=1e-3)


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


def test_bootstrap_interval():
    rng = np.random.default_rng(0)
    assert statistics.bootstrap_interval(np.full((2, 3), 0.5), rng) == (0.5, 0.5)
    # Three backbones that differ, seeds that do not: the interval is that of three values, not of thirty.
    rho = np.repeat([[-1.0], [0.0], [1.0]], 10, axis=1)
    assert statistics.bootstrap_interval(rho, rng) == (-1, 1)
    assert statistics.bootstrap_interval(np.array([[0.3, np.nan]]), rng) == pytest.approx((0.3, 0.3))


def test_correlation():
    up = np.tile(np.arange(6.0), (2, 3, 1))
    found = statistics.correlation(up, up)
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.p == pytest.approx(2 / 720) and found.rho.shape == (2, 3)
    # A run that is missing is no evidence, and neither is one that is constant.
    gone = up.copy()
    gone[1, 2], gone[1, 1] = np.nan, 1
    found = statistics.correlation(up, gone)
    assert np.isnan(found.rho).sum() == 2 and found.mean == pytest.approx(1) and found.p == pytest.approx(2 / 720)
    assert all(math.isnan(value) for value in statistics.correlation(up, np.zeros_like(up))[1:])
