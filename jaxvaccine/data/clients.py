"""How rows are split among clients: how many each gets, and which."""

import math
from collections.abc import Sequence

import numpy as np

SPLITS = "iid, sorted or dirichlet:ALPHA"
SIZES = ("equal", "unequal")


def client_sizes(n: int, clients: int, kind: str = "equal") -> np.ndarray:
    """[clients] int, how many of n rows each gets: as many as the others, or one more; or, "unequal", in proportion to
    1, 2, …, clients.

    Raises:
      ValueError: another kind, or a client would get none.
    """
    if kind not in SIZES:
        raise ValueError(f"sizes: found {kind!r}, expected {' or '.join(SIZES)}")
    parts = np.ones(clients) if kind == "equal" else np.arange(1, clients + 1, dtype=float)
    # Rounded ends of consecutive pieces, so that the pieces sum to n.
    ends = np.floor(n * parts.cumsum() / parts.sum() + 0.5).astype(int)
    sizes = np.diff(ends, prepend=0)
    if sizes.min() < 1:
        raise ValueError(f"n: found {n} rows for {clients} clients of {kind} sizes, of which one would get none, "
                         "expected more")
    return sizes


def parse_split(text: str) -> float:
    """What a split says of Dirichlet's alpha: inf of iid, 0 of sorted.

    Raises:
      ValueError: no split.
    """
    name, _, value = text.partition(":")
    if value == "" and text in ("iid", "sorted"):
        return math.inf if text == "iid" else 0.0
    try:
        alpha = float(value)
    except ValueError:
        alpha = math.nan
    if name != "dirichlet" or not 0 < alpha < math.inf:
        raise ValueError(f"split: found {text!r}, expected {SPLITS}, ALPHA a number above 0")
    return alpha


def split_rows(labels: Sequence[str], sizes: Sequence[int] | np.ndarray, split: str, seed: int) -> list[np.ndarray]:
    """Which rows every client gets, each row once, in random order.

    "iid" draws them without a look at labels. "sorted" gives the rows in the order of their labels, piece by piece, to
    clients in random order, so that most have one label. "dirichlet:ALPHA" draws for every client what part of its rows
    each label is to have, from a Dirichlet distribution of ALPHA times the labels' parts (Hsu et al., arXiv 1909.06335,
    section 3); where a label's rows are used up the others are drawn in their proportions. Small ALPHA is near to one
    label a client, large to iid.

    Args:
      labels: [n], of the rows.
      sizes: [clients], how many each gets, n in all.
      split: as above.
      seed: of all draws.

    Raises:
      ValueError: no such split; sizes that do not sum to n; or labels that are hardly shared by rows, so that there is
        nothing to sort by.
    """
    alpha, sizes, n = parse_split(split), np.asarray(sizes), len(labels)
    if sizes.sum() != n:
        raise ValueError(f"sizes: found {sizes.sum()} rows in all, expected {n}, the labels'")
    names, kinds = np.unique(np.array(list(labels), dtype=str), return_inverse=True)
    if math.isfinite(alpha) and 2 * len(names) > n:
        raise ValueError(f"split: found {split!r} of {n} rows with {len(names)} answers, expected iid: a task with few "
                         "answers is split by them")
    rng = np.random.default_rng([seed, 3])  # poisoning draws from 0 to 2
    shuffled = rng.permutation(n)
    if math.isinf(alpha):
        return np.split(shuffled, sizes.cumsum()[:-1])
    if alpha == 0:
        order = rng.permutation(len(sizes))
        ordered = shuffled[np.argsort(kinds[shuffled], kind="stable")]
        pieces = np.split(ordered, sizes[order].cumsum()[:-1])
        by_client = dict(zip(order.tolist(), pieces, strict=True))
        return [rng.permutation(by_client[i]) for i in range(len(sizes))]
    return _dirichlet(shuffled, kinds, sizes, alpha, rng)


def _dirichlet(shuffled: np.ndarray, kinds: np.ndarray, sizes: np.ndarray, alpha: float, rng: np.random.Generator
               ) -> list[np.ndarray]:
    left = [list(shuffled[kinds[shuffled] == kind]) for kind in range(kinds.max() + 1)]
    prior = np.array([len(rows) for rows in left]) / len(kinds)
    found: list[list[int]] = [[] for _ in sizes]
    # In random order: whoever comes last takes what is left.
    for i in rng.permutation(len(sizes)):
        parts = rng.dirichlet(alpha * prior)
        for _ in range(sizes[i]):
            counts = np.array([len(rows) for rows in left])
            chances = np.where(counts > 0, parts, 0)
            chances = chances if chances.sum() > 0 else counts
            found[i].append(left[rng.choice(len(left), p=chances / chances.sum())].pop())
    return [np.array(rows) for rows in found]
