"""How far two judges agree on the same answers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxvaccine.evaluation.judges import HARMFUL, NO_ANSWER, NOT_REFUSED, REFUSED, UNREAD
from jaxvaccine.evaluation.rates import Rate, percent, rate, wilson_interval

WORDS = (HARMFUL, NOT_REFUSED, REFUSED, NO_ANSWER, UNREAD)


class Agreement(NamedTuple):
    """Two judges' verdicts on the same answers.

    Attributes:
      table: number of answers by the first judge's verdict (rows) and the second's (columns), in the order of WORDS.
      rate: percent of the answers on which they agree, of those that both judged: what is no answer or unread is left
        out. "Not refused" agrees with "harmful": it is all that a judge of phrases says. None if they judged none.
      kappa: Cohen's, on the same answers; None where chance alone would agree always, or there are none.
      kappa_interval: its 95% percentile-bootstrap interval.
    """

    table: tuple[tuple[int, ...], ...]
    rate: Rate | None
    kappa: float | None
    kappa_interval: tuple[float, float] | None


def cohen_kappa(table: np.ndarray) -> np.ndarray:
    """(p_o - p_e) / (1 - p_e) of tables [..., C, C] of counts; NaN where p_e is 1.

    p_o is the share on the diagonal, p_e what it would be if rows and columns were independent (J. Cohen, "A
    coefficient of agreement for nominal scales", Educational and Psychological Measurement 20, 1960).
    """
    p = table / table.sum(axis=(-2, -1), keepdims=True)
    observed = np.trace(p, axis1=-2, axis2=-1)
    expected = (p.sum(axis=-1) * p.sum(axis=-2)).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)


class Against(NamedTuple):
    """A judge beside labels that are taken for right, over the answers that it gave a verdict on.

    Attributes:
      found: percent of the harmful answers that it calls harmful, or not refused.
      spared: percent of the others that it calls neither. What is no answer it calls neither.
      balanced_accuracy: the mean of both; 50 is what a judge gets that says the same of all, or tosses a coin.
      unread: answers without a verdict, left out.
    """

    found: Rate
    spared: Rate
    balanced_accuracy: float
    unread: int


def against_labels(labels: Sequence[str], verdicts: Sequence[str]) -> Against:
    """Compares verdicts, of WORDS, with labels, HARMFUL or REFUSED, answer by answer.

    Raises:
      ValueError: another number of verdicts, another label, or no answers of one of the two that were judged.
    """
    if len(labels) != len(verdicts):
        raise ValueError(f"against_labels: found {len(labels)} labels and {len(verdicts)} verdicts, expected as many")
    if unknown := sorted({*labels} - {HARMFUL, REFUSED}):
        raise ValueError(f"against_labels: found label {unknown[0]!r}, expected {HARMFUL} or {REFUSED}")
    calls = {label: [verdict in (HARMFUL, NOT_REFUSED) for of, verdict in zip(labels, verdicts, strict=True)
                     if of == label and verdict != UNREAD] for label in (HARMFUL, REFUSED)}
    for label, of in calls.items():
        if not of:
            raise ValueError(f"against_labels: found no judged answers that are labelled {label!r}, expected some")
    found, spared = rate(calls[HARMFUL]), rate([not call for call in calls[REFUSED]])
    return Against(found, spared, (found.score + spared.score) / 2, sum(verdict == UNREAD for verdict in verdicts))


def agreement(first: Sequence[str], second: Sequence[str], draws: int = 2000, seed: int = 0) -> Agreement:
    """Compares two judges' verdicts, each one of WORDS, answer by answer.

    Args:
      first, second: of as many answers, in the same order.
      draws, seed: of the bootstrap over answers.

    Raises:
      ValueError: another number of verdicts, an unknown one, or none.
    """
    if len(first) != len(second):
        raise ValueError(f"agreement: found {len(first)} and {len(second)} verdicts, expected as many")
    unknown = sorted({*first, *second} - set(WORDS))
    if unknown:
        raise ValueError(f"agreement: found verdict {unknown[0]!r}, expected one of {', '.join(WORDS)}")
    if not len(first):
        raise ValueError("agreement: found no verdicts, expected some")
    table = np.array([[sum(pair == (a, b) for pair in zip(first, second, strict=True)) for b in WORDS] for a in WORDS])
    judged = np.add.reduceat(np.add.reduceat(table[:3, :3], (0, 2), axis=0), (0, 2), axis=1)
    n, same = int(judged.sum()), int(np.trace(judged))
    if not n:
        return Agreement(tuple(map(tuple, table.tolist())), None, None, None)
    kappa, interval = float(cohen_kappa(judged)), None
    if np.isnan(kappa):
        kappa = None
    else:
        # What scipy.stats.bootstrap draws over answers, as counts: without its draws × answers array; and where draws
        # have no kappa (each judge says the same of all answers drawn), the others count, and SciPy's interval is NaN.
        samples = np.random.default_rng(seed).multinomial(n, judged.ravel() / n, draws).reshape(draws, 2, 2)
        low, high = np.nanpercentile(cohen_kappa(samples), [2.5, 97.5])
        interval = (float(low), float(high))
    return Agreement(tuple(map(tuple, table.tolist())), Rate(n, percent(same, n), wilson_interval(same, n)), kappa,
                     interval)
