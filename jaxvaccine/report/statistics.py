"""The numbers of every report: mean ± standard deviation, one 95% interval, differences to another method, the
probability of a high score, rank correlations over layers.

A run is a backbone and a seed. What is measured on a run is measured on prompts, the same of all runs. By SciPy where
it has them (scipy.stats is imported when it is asked: it takes a second).
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from jaxvaccine.evaluation.rates import mean_score_interval

RUN = ["backbone", "seed"]
UNBOUNDED = (-math.inf, math.inf)
PERCENT_BOUNDS, DIFFERENCE_BOUNDS, CORRELATION_BOUNDS = (0.0, 100.0), (-100.0, 100.0), (-1.0, 1.0)
# What an interval is over, from the most to the least that it speaks for; "" where there is none.
BACKBONES, SEEDS, PROMPTS = "backbones", "seeds", "prompts"
HALF = 50.0  # percent
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A quantity over N runs.

    Attributes:
      values: [N], one per run.
      mean: of the backbones' means, each over its seeds: a backbone counts once, however many seeds it has.
      sd: the standard deviation of `values` (N − 1); NaN of a single run.
      low, high: 95% interval of the mean, by `interval`; NaN where there is none.
      over: what it is over: BACKBONES, SEEDS (of the only backbone), PROMPTS (of the only run), or "" without any.
    """

    values: np.ndarray
    mean: float
    sd: float
    low: float
    high: float
    over: str = ""

    @property
    def runs(self) -> int:
        return len(self.values)


class Interval(NamedTuple):
    """95% interval of a mean; NaN and "" where nothing tells how far it may be off."""

    mean: float
    low: float
    high: float
    over: str


def interval(values: Sequence[float], backbones: Sequence[str] | None = None, own: np.ndarray | None = None,
             bounds: tuple[float, float] = UNBOUNDED) -> Interval:
    """The one interval of all reports: of the mean over backbones, seeds and prompts.

    Runs of a backbone are alike, and no independent evidence of what another backbone would give. So a backbone's mean
    over its seeds is one observation, and between them it is Student's t with a degree of freedom fewer than there are
    backbones. With unequal numbers of seeds, and so unequal variances, that t is conservative at 95% (R. Ibragimov and
    U. K. Müller, "t-statistic based correlation and heterogeneity robust inference", JBES 28, 2010). With one backbone
    the observations are its seeds, and the interval says nothing of other backbones.

    t sees what differs between runs, and not that all runs answer the same prompts, which other prompts would change
    for all alike. That part is at most what it is if all runs err alike: the mean of the runs' own distances from their
    value to either end of their interval over prompts, each of the n of one run (a standard deviation of a mean is at
    most the mean of standard deviations). Both parts are joined by the root of their squares, for either end (G. Y. Zou
    and A. Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27, 2008). So there
    is width where all runs give 100, and the interval of a single run is its own.

    Args:
      values: [N], one per run, N > 0.
      backbones: [N], of the runs; None if all are of one.
      own: [N, 2], low and high of every run over its prompts; None or NaN where there is none.
      bounds: of the quantity, at which the interval is cut.
    """
    values = np.asarray(values, dtype=float)
    names = np.zeros(len(values)) if backbones is None else np.asarray(backbones)
    groups = [names == name for name in dict.fromkeys(names)]
    means = np.array([values[group].mean() for group in groups])
    apart, over = (means, BACKBONES) if len(means) > 1 else (values, SEEDS)
    half = 0.0
    if len(apart) > 1:
        half = special.stdtrit(len(apart) - 1, 0.975) * apart.std(ddof=1) / math.sqrt(len(apart))
    mean, down, up = float(means.mean()), 0.0, 0.0
    own = np.full((len(values), 2), math.nan) if own is None else np.asarray(own, dtype=float).reshape(-1, 2)
    known = ~np.isnan(own).any(axis=1)
    if known.any():
        # Rounding may put a rate of 100% an epsilon above its interval.
        lengths = np.maximum((own - values[:, None]) * [-1, 1], 0)
        down, up = np.mean([lengths[group & known].mean(axis=0) for group in groups if (group & known).any()], axis=0)
    elif len(apart) == 1:
        return Interval(mean, math.nan, math.nan, "")
    low, high = np.clip([mean - math.hypot(half, down), mean + math.hypot(half, up)], *bounds)
    return Interval(mean, float(low), float(high), over if len(apart) > 1 else PROMPTS)


def _estimate(values: Sequence[float], backbones: Sequence[str] | None, own: np.ndarray | None,
              bounds: tuple[float, float]) -> Estimate | None:
    values = np.asarray(values, dtype=float)
    if not len(values):
        return None
    mean, *ends, over = interval(values, backbones, own, bounds)
    return Estimate(values, mean, float(values.std(ddof=1)) if len(values) > 1 else math.nan, *ends, over)


def estimate(values: Sequence[float], percent: bool = False, own: np.ndarray | None = None,
             backbones: Sequence[str] | None = None) -> Estimate | None:
    """Mean, deviation and interval of [N] values, one per run; None without any.

    Args:
      values: one per run.
      percent: whether they are percentages, so that the interval lies within 0 and 100.
      own, backbones: as of `interval`.
    """
    return _estimate(values, backbones, own, PERCENT_BOUNDS if percent else UNBOUNDED)


def own_intervals(rows: pd.DataFrame, percent: bool = False) -> np.ndarray:
    """[N, 2]: the interval over prompts of every row; of a percentage without one Wilson's of its n, if that is known.
    """
    own = np.column_stack([rows[end].to_numpy(dtype=float) for end in ("low", "high")])
    unknown = np.isnan(own).any(axis=1)
    if percent and unknown.any():
        for i in np.flatnonzero(unknown & (rows["n"] >= 1).to_numpy()):
            value, n = rows["value"].iloc[i], int(rows["n"].iloc[i])
            own[i] = mean_score_interval(value * n / 100, n)
    return own


def estimate_rows(rows: pd.DataFrame, percent: bool = False) -> Estimate | None:
    """`estimate` of the rows of one cell, measure and step in a table of results, one per run."""
    return estimate(rows["value"].to_numpy(), percent, own_intervals(rows, percent), rows["backbone"].to_numpy())


def estimate_steps(rows: pd.DataFrame, percent: bool = False) -> dict[int, Estimate]:
    """{step: `estimate_rows`} of the rows of one cell and measure, in the order of steps."""
    return {int(step): estimate_rows(of, percent) for step, of in rows.groupby("step")}


def paired(rows: pd.DataFrame, reference: pd.DataFrame, percent: bool = False) -> Estimate | None:
    """The mean difference of runs to the reference's runs of the same backbone and seed; None without such a pair.

    Everything that a backbone and a seed do to both alike is gone from a difference, and so it is from the interval,
    which is `interval` of the differences. The part of the prompts: the table has no verdicts, so that a pair's own
    interval is the one of two rates that are independent given their prompts (R. G. Newcombe, "Interval estimation for
    the difference between independent proportions", Statistics in Medicine 17, 1998, method 10). It is too wide where
    both models fall for the same prompts, as they do, and too narrow only if one falls for those that the other
    withstands.

    Args:
      rows, reference: of one cell, measure and step each, one per run.
      percent: whether values are percentages, so that differences lie within −100 and 100.

    Raises:
      ValueError: a run is there twice.
    """
    def by_run(of: pd.DataFrame) -> dict[tuple[str, int], np.ndarray]:  # value, low, high
        runs = list(zip(of["backbone"], of["seed"], strict=True))
        if twice := [run for run in dict.fromkeys(runs) if runs.count(run) > 1]:
            raise ValueError(f"differences: found a second row of backbone {twice[0][0]}, seed {twice[0][1]}, expected "
                             "one")
        return dict(zip(runs, np.column_stack([of["value"], own_intervals(of, percent)]), strict=True))

    first, second = by_run(rows), by_run(reference)
    runs = [run for run in first if run in second]
    if not runs:
        return None
    (value, low, high), (other, least, most) = (np.array([of[run] for run in runs]).T for of in (first, second))
    difference = value - other
    own = np.column_stack([difference - np.hypot(value - low, most - other),
                           difference + np.hypot(high - value, other - least)])
    return _estimate(difference, [backbone for backbone, _ in runs], own,
                     DIFFERENCE_BOUNDS if percent else UNBOUNDED)


class Probability(NamedTuple):
    """Of a new run's value above a threshold.

    Attributes:
      count, runs: how many of the runs are above.
      mean: the probability, from 0 to 1; it is never 0 or 1.
      low, high: its 95% interval.
    """

    count: int
    runs: int
    mean: float
    low: float
    high: float


def probability(values: Sequence[float], backbones: Sequence[str], threshold: float = HALF) -> Probability | None:
    """The probability that a new run, of a new backbone and a new seed, has a value above the threshold.

    A backbone counts as one trial however many seeds it has, and the part of its runs that are above as so much of a
    success; with one backbone every seed is a trial, and it is the probability of a new seed. With Jeffreys' prior the
    posterior of k of m is Beta(k + 1/2, m − k + 1/2): its mean is the probability of the next one, and its middle 95%
    the interval, which begins at 0 where k is 0 and ends at 1 where k is m (L. D. Brown, T. T. Cai and A. DasGupta,
    "Interval estimation for a binomial proportion", Statistical Science 16, 2001). The value is the measured one, on
    the prompts of the test.

    Args:
      values, backbones: [N], one per run.
      threshold: a value equal to it is not above.

    Returns:
      None of a single run, which says nothing about others, or of none.
    """
    hits, names = np.asarray(values, dtype=float) > threshold, np.asarray(backbones)
    if len(hits) < 2:
        return None
    parts = [hits[names == name].mean() for name in dict.fromkeys(names)]
    trials = parts if len(parts) > 1 else hits
    successes, failures = float(np.sum(trials)), float(len(trials) - np.sum(trials))
    low, high = special.betaincinv(successes + 0.5, failures + 0.5, [0.025, 0.975])
    return Probability(int(hits.sum()), len(hits), (successes + 0.5) / (len(trials) + 1),
                       float(low) if hits.any() else 0.0, 1.0 if hits.all() else float(high))


def above(rows: pd.DataFrame, threshold: float = HALF) -> Probability | None:
    """`probability` of the rows of one cell, measure and step in a table of results, one per run."""
    return probability(rows["value"].to_numpy(), rows["backbone"].to_numpy(), threshold)


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ over the last axis of [..., L]; NaN where one of both is constant."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return np.asarray(stats.spearmanrho(np.asarray(x, float), np.asarray(y, float), axis=-1).statistic)


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
      mean: of the backbones' means over the runs that have one.
      low, high, over: 95% interval of the mean, by `interval`; NaN of a single run. It is over runs: which layers there
        are is given, and so are the prompts.
      p: by `permutation_p`.
    """

    rho: np.ndarray
    mean: float
    low: float
    high: float
    over: str
    p: float


def correlation(x: np.ndarray, y: np.ndarray) -> Correlation:
    """Of [backbones, seeds, L]; NaN all where no run has a ρ. A run that is missing is NaN."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    rho = rank_correlations(x, y)
    known = ~np.isnan(rho)
    if not known.any():
        return Correlation(rho, math.nan, math.nan, math.nan, "", math.nan)
    runs = [values[known] for values in (x, y)]
    return Correlation(rho, *interval(rho[known], np.nonzero(known)[0], bounds=CORRELATION_BOUNDS),
                       permutation_p(*runs, np.random.default_rng(0)))
