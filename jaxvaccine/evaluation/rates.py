"""Rates in percent, with the intervals that n answers leave open."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Rate(NamedTuple):
    """Percent of n, with its 95% Wilson interval."""

    n: int
    score: float
    interval: tuple[float, float]


def percent(count: float, n: int) -> float:
    """100 count / n. Raises ValueError without anything to count."""
    if n < 1:
        raise ValueError("rate: found no predictions, expected at least one")
    return 100 * count / n


def rate(counts: Sequence[bool]) -> Rate:
    """The rate of what counts. Raises ValueError if there is nothing."""
    count, n = sum(counts), len(counts)
    return Rate(n, percent(count, n), wilson_interval(count, n))


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for count of n, in percent; it behaves at 0, at n and for small n.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    from scipy.stats import binomtest

    _check(count, n)
    low, high = binomtest(int(count), n).proportion_ci(0.95, method="wilson")
    return 100 * float(low), 100 * float(high)


def mean_score_interval(total: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for the mean of n scores from 0 to 1 whose sum is `total`, in percent.

    Ours, since SciPy takes whole counts only; equal to `wilson_interval` where the scores are 0 or 1. Of all variables
    from 0 to 1 with this mean, one that is 0 or 1 has the largest variance: for others the interval is rather too wide.
    """
    p = _check(total, n) / 100
    z = 1.959963984540054  # the normal distribution's 97.5th percentile
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 100 / (1 + z * z / n)
    # For 0 and for n of n one end is exact, which rounding must not miss.
    return scale * (middle - half) if total else 0.0, scale * (middle + half) if total < n else 100.0


def _check(count: float, n: int) -> float:
    found = percent(count, n)
    if not 0 <= count <= n:
        raise ValueError(f"rate: found {count} of {n}, expected 0 <= count <= n")
    return found
