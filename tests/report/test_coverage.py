"""How often the 95% intervals of reports hold the truth, by simulation: three backbones with three seeds each, a
hundred prompts that all of them answer. 2000 repetitions have a standard error of half a percentage point."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from jaxvaccine.report import statistics

REPETITIONS, BACKBONES, SEEDS, PROMPTS = 2000, 3, 3, 100
LEAST = 0.93
NAMES = np.repeat(np.arange(BACKBONES), SEEDS)
Z = stats.norm.ppf(0.975)


def wilson(rates):
    """[..., 2] in percent, of rates in percent of PROMPTS."""
    p, square = rates / 100, Z * Z / PROMPTS
    half = np.sqrt(p * (1 - p) * square + square * square / 4)
    return 100 * np.clip(np.stack([p + square / 2 - half, p + square / 2 + half], -1) / (1 + square), 0, 1)


def normals(rng, backbone_sd, seed_sd=1.0):
    """[repetitions, backbones, seeds]."""
    return (backbone_sd * rng.normal(size=(REPETITIONS, BACKBONES, 1))
            + seed_sd * rng.normal(size=(REPETITIONS, BACKBONES, SEEDS)))


def scores(rng, probabilities, shared):
    """Percentages of prompts that [repetitions, backbones, seeds] runs fall for, each with its probability.

    shared: of a prompt's difficulty, the part that is the same for all runs, from 0 (answers are drawn anew by every
    run) to 1 (there are easy and hard prompts).
    """
    threshold = stats.norm.ppf(probabilities)[..., None]
    difficulty = math.sqrt(shared) * rng.normal(size=(REPETITIONS, 1, 1, PROMPTS))
    own = math.sqrt(1 - shared) * rng.normal(size=(*probabilities.shape, PROMPTS))
    return 100 * (difficulty + own < threshold).mean(-1)


def coverage(values, truth, own=None, bounds=statistics.PERCENT_BOUNDS):
    flat = values.reshape(len(values), -1)
    own = [None] * len(flat) if own is None else own.reshape(len(flat), -1, 2)
    found = [statistics.interval(*of, bounds) for of in zip(flat, itertools.repeat(NAMES), own, strict=False)]
    return np.mean([each.low - 1e-9 <= truth <= each.high + 1e-9 for each in found])


def coverage_of_all_runs(values, truth):
    """Of Student's t over the nine runs, as if they were independent: what reports had."""
    flat = values.reshape(len(values), -1)
    half = stats.t.ppf(0.975, flat.shape[1] - 1) * stats.sem(flat, axis=1)
    return np.mean(np.abs(flat.mean(1) - truth) <= half)


def test_wilsons_interval_here_is_the_products():
    from jaxvaccine.evaluation.rates import wilson_interval

    for count in (0, 1, 37, 100):
        assert wilson(np.array(float(count))) == pytest.approx(wilson_interval(count, PROMPTS))


@pytest.mark.parametrize("ratio, most_before", [(1, 0.85), (2, 0.78)])
def test_backbones_that_vary_as_much_as_seeds_and_twice_as_much(ratio, most_before):
    rng = np.random.default_rng(0)
    values = 50 + 6 * normals(rng, ratio)
    assert coverage(values, 50) >= LEAST, "what is measured without error, such as a loss"
    assert coverage_of_all_runs(values, 50) < most_before
    for shared in (0, 0.9):
        measured = scores(rng, np.clip(values / 100, 1e-6, 1 - 1e-6), shared)
        assert coverage(measured, 50, wilson(measured)) >= LEAST
        assert coverage_of_all_runs(measured, 50) < LEAST - 0.05


def test_numbers_of_seeds_that_differ():
    """One backbone with one seed, one with two, one with three."""
    rng = np.random.default_rng(1)
    kept = np.array([True, False, False, True, True, False, True, True, True])
    flat = normals(rng, 1).reshape(REPETITIONS, -1)[:, kept]
    found = [statistics.interval(values, NAMES[kept]) for values in flat]
    assert np.mean([each.low <= 0 <= each.high for each in found]) >= LEAST


@pytest.mark.parametrize("center", [-4.5, 4.5, *(pytest.param(x, marks=pytest.mark.long) for x in (-3, 3))])
@pytest.mark.parametrize("ratio, shared", [(1, 0), (1, 0.9), (2, 0.9)])
def test_rates_near_0_and_100(center, ratio, shared):
    """Runs whose odds vary by half: most of the rates are 0 to 10%, or 90 to 100%."""
    rng = np.random.default_rng(2)
    many = rng.normal(size=1_000_000) * 0.5 * math.hypot(1, ratio)
    values = scores(rng, special.expit(center + 0.5 * normals(rng, ratio)), shared)
    assert coverage(values, 100 * special.expit(center + many).mean(), wilson(values)) >= LEAST


@pytest.mark.parametrize("shared", [0, 0.5, 0.9])
@pytest.mark.parametrize("rate", [1, 2, 5, 98])
def test_runs_that_differ_in_nothing_but_their_answers(rate, shared):
    """No variance between runs: t has nothing to see where prompts are shared, and the prompts' part must do."""
    values = scores(np.random.default_rng(3), np.full((REPETITIONS, BACKBONES, SEEDS), rate / 100), shared)
    assert coverage(values, rate, wilson(values)) >= LEAST


@pytest.mark.parametrize("low, high", [(0, 5), (95, 100)])
def test_runs_that_are_all_the_same(low, high):
    """Every run falls for the same prompts: what Wilson's interval covers, over rates that are near the end."""
    rng = np.random.default_rng(4)
    truth = rng.uniform(low, high, REPETITIONS)
    values = np.tile(rng.binomial(PROMPTS, truth / 100)[:, None, None] * 100 / PROMPTS, (1, BACKBONES, SEEDS))
    assert np.mean([coverage(values[i:i + 1], truth[i], wilson(values[i:i + 1])) for i in range(REPETITIONS)]) >= LEAST


def frames(values):
    """As tables of results with what `paired` reads."""
    import pandas as pd

    own = wilson(values)
    for i in range(len(values)):
        yield pd.DataFrame({"backbone": NAMES, "seed": np.tile(np.arange(SEEDS), BACKBONES), "value": values[i].ravel(),
                            "n": PROMPTS, "low": own[i, ..., 0].ravel(), "high": own[i, ..., 1].ravel()})


@pytest.mark.parametrize("ratio", [1, 2])
def test_paired_differences(ratio):
    """A backbone and a seed do much to both methods, and something else to either."""
    rng = np.random.default_rng(5)
    common = 5 * normals(rng, ratio)
    sides = [scores(rng, np.clip((mean + common + 4 * normals(rng, ratio)) / 100, 0.001, 0.999), 0.5)[:600]
             for mean in (60, 40)]
    found = [statistics.paired(*rows, percent=True) for rows in zip(*map(frames, sides), strict=True)]
    assert np.mean([each.low <= 20 <= each.high for each in found]) >= LEAST


@pytest.mark.parametrize("center", [0, 10, 20, 40])
@pytest.mark.parametrize("ratio", [1, 2])
def test_the_probability_of_a_high_score(center, ratio):
    rng = np.random.default_rng(6)
    values = (50 + center + 15 * normals(rng, ratio)).reshape(REPETITIONS, -1)
    truth = stats.norm.cdf(center / (15 * math.hypot(1, ratio)))
    found = [statistics.probability(each, NAMES) for each in values]
    assert np.mean([each.low <= truth <= each.high for each in found]) >= LEAST
    # What is expected of a new run is drawn towards a half, by at most what one half of a trial does.
    assert np.mean([each.mean for each in found]) == pytest.approx((3 * truth + 0.5) / 4, abs=0.02)


@pytest.mark.parametrize("ratio", [1, 2])
def test_correlations_over_layers(ratio):
    """Norms and effects of twelve layers that share what a backbone and a seed make of it."""
    rng = np.random.default_rng(7)
    weight = np.clip(0.6 + 0.15 * normals(rng, ratio), 0, 1)[..., None]
    x, noise = rng.normal(size=(2, REPETITIONS, BACKBONES, SEEDS, 12))
    rho = statistics.rank_correlations(x, weight * x + np.sqrt(1 - weight**2) * noise)
    truth = rho.mean()  # of 18 000 runs
    assert coverage(rho, truth, bounds=statistics.CORRELATION_BOUNDS) >= LEAST
    assert coverage_of_all_runs(rho, truth) < coverage(rho, truth, bounds=statistics.CORRELATION_BOUNDS)


def test_a_hierarchical_bootstrap_covers_less():
    """Of percentiles, backbones drawn and then seeds, as reports of layers had."""
    rng = np.random.default_rng(8)
    values = normals(rng, 1)[:500]
    drawn = rng.integers(BACKBONES, size=(400, BACKBONES, 1)), rng.integers(SEEDS, size=(400, BACKBONES, SEEDS))
    ends = [np.percentile(each[drawn].mean((1, 2)), [2.5, 97.5]) for each in values]
    assert np.mean([low <= 0 <= high for low, high in ends]) < 0.85
