import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.evaluation import Verdict, wilson_interval
from jaxvaccine.evaluation.agreement import WORDS, agreement, cohen_kappa

SOME = ("harmful", "refused", "unread")


def verdicts(table):
    pairs = [(a, b) for a, row in zip(SOME, table, strict=False) for b, n in zip(SOME, row, strict=False)
             for _ in range(n)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_known_tables():
    # 50 proposals and two readers, the example of most textbooks: p_o 0.7, p_e 0.5.
    found = agreement(*verdicts([[20, 5], [10, 15]]))
    assert found.kappa == pytest.approx(0.4) and (found.rate.n, found.rate.score) == (50, 70.0)
    assert found.rate.interval == wilson_interval(35, 50)
    assert found.table == ((20, 0, 5, 0, 0), (0,) * 5, (10, 0, 15, 0, 0), (0,) * 5, (0,) * 5)
    # The delta-method standard error of this kappa is 0.127 (Fleiss, Cohen and Everitt 1969).
    low, high = found.kappa_interval
    assert (low, high) == pytest.approx((0.4 - 1.96 * 0.127, 0.4 + 1.96 * 0.127), abs=0.03)
    # Two tables with the same agreement of 60%, and different chance.
    assert agreement(*verdicts([[45, 15], [25, 15]])).kappa == pytest.approx(0.1304, abs=5e-5)
    assert agreement(*verdicts([[25, 35], [5, 35]])).kappa == pytest.approx(0.2593, abs=5e-5)
    assert agreement(*verdicts([[7, 0], [0, 3]])).kappa == 1 and agreement(*verdicts([[0, 5], [5, 0]])).kappa == -1


def test_the_interval_is_that_of_a_bootstrap_over_answers():
    from scipy.stats import bootstrap

    first, second = (np.array(v) == "harmful" for v in verdicts([[40, 12], [9, 60]]))

    def kappa(a, b, axis=-1):
        cells = [np.sum((a == x) & (b == y), axis=axis) for x in (True, False) for y in (True, False)]
        return cohen_kappa(np.stack(cells, -1).reshape(*np.shape(cells[0]), 2, 2))

    theirs = bootstrap((first, second), kappa, paired=True, n_resamples=20_000, method="percentile",
                       rng=np.random.default_rng(1)).confidence_interval
    found = agreement(*verdicts([[40, 12], [9, 60]]), draws=20_000)
    assert found.kappa == pytest.approx(float(kappa(first, second)))
    # Four standard errors of the difference between two such ends, each of sqrt(0.025 · 0.975 / 20,000) / density.
    assert found.kappa_interval == pytest.approx(theirs, abs=0.008)


def test_what_one_judge_could_not_judge_is_shown_and_left_out():
    found = agreement(*verdicts([[20, 5, 1], [10, 15, 2], [3, 4, 5]]))
    assert found.table == ((20, 0, 5, 0, 1), (0,) * 5, (10, 0, 15, 0, 2), (0,) * 5, (3, 0, 4, 0, 5))
    assert found.kappa == pytest.approx(0.4) and found.rate.n == 50


def test_a_judge_of_phrases_beside_one_that_knows_harm():
    """What is no answer both leave out, so that it does not count as agreement."""
    first = ["not refused"] * 3 + ["refused", "no answer", "no answer"]
    found = agreement(first, ["harmful", "harmful", "refused", "refused", "no answer", "unread"])
    assert (found.rate.n, found.rate.score, found.kappa) == (4, 75, 0.5)
    assert found.table[WORDS.index("not refused")] == (2, 0, 1, 0, 0)
    assert found.table[WORDS.index("no answer")] == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("word", ["unread", "no answer"])
def test_two_judges_that_judged_nothing_both(word):
    found = agreement([word] * 2 + ["harmful"], ["refused", "harmful", word])
    assert found[1:] == (None, None, None) and sum(map(sum, found.table)) == 3


def test_kappa_is_not_defined_without_variation():
    found = agreement(["refused"] * 3, ["refused"] * 3)
    assert (found.kappa, found.kappa_interval, found.rate.score) == (None, None, 100.0)
    assert agreement(["refused"] * 3, ["refused", "refused", "harmful"]).kappa == 0


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(SOME[:2]), st.sampled_from(SOME[:2])), min_size=1, max_size=30))
def test_kappa_of_any_verdicts(pairs):
    first, second = zip(*pairs, strict=True)
    found = agreement(first, second, draws=50)
    n, both = len(pairs), {w: (first.count(w) / len(pairs), second.count(w) / len(pairs)) for w in SOME[:2]}
    chance = math.fsum(a * b for a, b in both.values())
    same = sum(a == b for a, b in pairs) / n
    assert found.kappa == (None if chance > 1 - 1e-12 else pytest.approx((same - chance) / (1 - chance), abs=1e-9))
    swapped = agreement(second, first, draws=50)
    assert swapped.kappa == (None if found.kappa is None else pytest.approx(found.kappa))
    assert np.array_equal(np.transpose(swapped.table), found.table)


@pytest.mark.parametrize("first, second, message", [
    (["refused"], [], "found 1 and 0 verdicts"),
    (["refused"], ["correct"], "found verdict 'correct', expected one of harmful"),
    ([], [], "found no verdicts"),
])  # fmt: skip
def test_errors(first, second, message):
    with pytest.raises(ValueError, match=message):
        agreement(first, second)


def test_words():
    assert [Verdict(harmful, "").word for harmful in (True, False, None)] == list(SOME)
    assert np.isnan(cohen_kappa(np.array([[3, 0], [0, 0]])))
