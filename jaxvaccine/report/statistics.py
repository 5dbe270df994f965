"""The numbers of every report: mean ± standard deviation, one 95% interval, rank correlations over layers.

A run is a backbone and a seed. By scipy.stats where it has them (imported when it is asked: it takes a second); ours is
the hierarchical bootstrap alone, which it has not.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

PERCENT_BOUNDS = (0.0, 100.0)
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A quantity over N runs.

    Attributes:
      values: [N], one per run.
      mean: of them.
      sd: the sample's standard deviation; NaN of a single run.
      low, high: 95% interval of the mean over runs; of a single run its own interval over prompts, NaN if it has none.
    """

    values: np.ndarray
    mean: float
    sd: float
    low: float
    high: float

    @property
    def runs(self) -> int:
        return len(self.values)


def interval(values: np.ndarray, bounds: tuple[float, float] = (-math.inf, math.inf)) -> tuple[float, float]:
    """95% interval of the mean over runs: Student's t, cut at the bounds of the quantity; NaN of a single run."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    low, high = np.clip([values.mean() - half, values.mean() + half], *bounds)
    return float(low), float(high)


def estimate(values: Sequence[float], percent: bool = False,
             own: tuple[float, float] = (math.nan, math.nan)) -> Estimate | None:
    """Mean, deviation and interval of [N] values, one per run; None without any.

    Args:
      values: one per run.
      percent: whether they are percentages, so that the interval lies within 0 and 100.
      own: interval of a single run by itself, such as Wilson's over its prompts.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return None
    if len(values) == 1:
        return Estimate(values, float(values[0]), math.nan, *map(float, own))
    low, high = interval(values, PERCENT_BOUNDS if percent else (-math.inf, math.inf))
    return Estimate(values, float(values.mean()), float(values.std(ddof=1)), low, high)


def estimate_rows(rows: pd.DataFrame, percent: bool = False) -> Estimate | None:
    """`estimate` of the rows of one cell, measure and step in a table of results, one per run."""
    own = (rows["low"].iloc[0], rows["high"].iloc[0]) if len(rows) == 1 else (math.nan, math.nan)
    return estimate(rows["value"].to_numpy(), percent, own)


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ over the last axis of [..., L]; NaN where one of both is constant."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return np.asarray(stats.spearmanrho(np.asarray(x, float), np.asarray(y, float), axis=-1).statistic)


def bootstrap_interval(rho: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95% interval of the mean of [backbones, seeds]: backbones drawn with replacement, then seeds in each of them."""
    backbones, seeds = rho.shape
    drawn = rng.integers(backbones, size=(RESAMPLES, backbones, 1)), rng.integers(seeds, size=(
        RESAMPLES, backbones, seeds))
    values = rho[drawn].reshape(RESAMPLES, -1)
    known = ~np.isnan(values)
    # A resample without any is left out.
    means = np.nansum(values, axis=1)[known.any(1)] / known.sum(axis=1)[known.any(1)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def permutation_p(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
    """Two-sided p of the mean ρ of [runs, L], none of them constant, if it did not matter which layer is which.

    The layers are exchanged in all runs alike: runs share what is due to a layer's place, and are no independent
    evidence of it. All orders of up to seven layers are gone through, else RESAMPLES random ones and the one found.
    """
    from scipy import stats

    def standard_ranks(values: np.ndarray) -> np.ndarray:  # of norm 1, so that ρ is a product and ranks are taken once
        ranks = stats.rankdata(values, axis=-1)
        ranks -= ranks.mean(-1, keepdims=True)
        return ranks / np.sqrt((ranks**2).sum(-1, keepdims=True))

    x_RxL, y_RxL = standard_ranks(np.asarray(x, float)), standard_ranks(np.asarray(y, float))

    def distance(order: np.ndarray, axis: int = -1) -> np.ndarray:  # [..., L] orders -> [...]
        del axis
        return np.abs((x_RxL[:, order] * y_RxL.reshape(len(y_RxL), *[1] * (order.ndim - 1), -1)).sum(-1).mean(0))

    found = stats.permutation_test((np.arange(x_RxL.shape[-1]),), distance, permutation_type="pairings",
                                   vectorized=True, n_resamples=RESAMPLES, alternative="greater", batch=RESAMPLES,
                                   rng=rng)
    return float(found.pvalue)


class Correlation(NamedTuple):
    """Rank correlation over layers.

    Attributes:
      rho: [backbones, seeds], Spearman's of every run; NaN where it is not defined.
      mean: over the runs that have one.
      low, high: 95% interval of the mean, by `bootstrap_interval`.
      p: by `permutation_p`.
    """

    rho: np.ndarray
    mean: float
    low: float
    high: float
    p: float


def correlation(x: np.ndarray, y: np.ndarray) -> Correlation:
    """Of [backbones, seeds, L]; NaN all where no run has a ρ. A run that is missing is NaN."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    rho = rank_correlations(x, y)
    if np.isnan(rho).all():
        return Correlation(rho, math.nan, math.nan, math.nan, math.nan)
    known = ~np.isnan(rho.ravel())
    runs = [values.reshape(-1, values.shape[-1])[known] for values in (x, y)]
    return Correlation(rho, float(np.nanmean(rho)), *bootstrap_interval(rho, np.random.default_rng(0)),
                       permutation_p(*runs, np.random.default_rng(0)))
