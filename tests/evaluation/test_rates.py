import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.evaluation.rates import Rate, mean_score_interval, percent, rate, wilson_interval

few = settings(max_examples=25)


# Newcombe, Statistics in Medicine 17 (1998), table I, Wilson's method: 81/263, 15/148, 0/20, 1/29.
@pytest.mark.parametrize("count, n, interval", [
    (81, 263, (25.53, 36.62)), (15, 148, (6.24, 16.05)), (0, 20, (0.0, 16.11)), (1, 29, (0.61, 17.18)),
    (20, 20, (83.89, 100.0)),
])  # fmt: skip
def test_wilson_interval(count, n, interval):
    assert wilson_interval(count, n) == pytest.approx(interval, abs=0.005)


@few
@given(st.integers(1, 10**6), st.data())
def test_wilson_interval_holds_the_rate_and_is_symmetric(n, data):
    count = data.draw(st.integers(0, n))
    low, high = wilson_interval(count, n)
    assert 0 <= low <= 100 * count / n <= high <= 100
    assert wilson_interval(n - count, n) == pytest.approx((100 - high, 100 - low))


@few
@given(st.integers(1, 10**6), st.data())
def test_the_interval_of_mean_scores_is_the_rates_where_scores_are_whole(n, data):
    count = data.draw(st.integers(0, n))
    assert mean_score_interval(count, n) == pytest.approx(wilson_interval(count, n), rel=1e-9, abs=1e-9)


@few
@given(st.integers(1, 1000), st.data())
def test_the_interval_of_mean_scores_holds_the_mean_and_grows_with_it(n, data):
    halves = data.draw(st.integers(1, 2 * n))
    (low, high), below = mean_score_interval(halves / 2, n), mean_score_interval((halves - 1) / 2, n)
    assert 0 <= low <= 50 * halves / n <= high <= 100
    assert below[0] < low and below[1] < high


def test_rate():
    assert rate([True, False, False, True]) == Rate(4, 50.0, wilson_interval(2, 4))


@pytest.mark.parametrize("call, message", [
    (lambda: percent(0, 0), "found no predictions"), (lambda: rate([]), "found no predictions"),
    (lambda: wilson_interval(0, 0), "found no predictions"),
    (lambda: wilson_interval(3, 2), "found 3 of 2, expected 0"),
    (lambda: mean_score_interval(2.5, 2), "found 2.5 of 2, expected 0"),
    (lambda: mean_score_interval(-0.5, 2), "found -0.5 of 2, expected 0"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
