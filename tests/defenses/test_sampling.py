"""T-Vaccine's draws against the exact probabilities of drawing layers one by one without replacement."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine.defenses.t_vaccine import sample_layers

pytestmark = pytest.mark.usefixtures("quick_compile")

KEY = jax.random.key(0)
DRAWS = 20_000

P = {
    "uniform": [1 / 6] * 6,
    "graded": [i / 36 for i in range(8, 0, -1)],
    "geometric": [2.0**-i for i in range(1, 8)] + [2.0**-7],
    "two large": [0.45, 0.03, 0.02, 0.05, 0.45],
    "zeros": [0.4, 0.0, 0.3, 0.2, 0.0, 0.1, 0.0],
    "near one": [0.0005, 0.0003, 0.999, 0.0002],
    "one": [0.0, 1.0, 0.0, 0.0],
}
SETTINGS = [("uniform", 3), ("graded", 1), ("graded", 3), ("graded", 7), ("geometric", 2), ("geometric", 4),
            ("geometric", 7), ("two large", 2), ("two large", 4), ("zeros", 2), ("zeros", 4), ("zeros", 6),
            ("near one", 1), ("near one", 2), ("near one", 3), ("one", 1), ("one", 2)]


def set_probabilities(p, count):
    """{set of layers: probability that they are the first `count` drawn}, from the sets of one layer less.

    A layer l is drawn next with p_l / (sum of p over the layers left); once all of these are 0, each equally likely.
    """
    sets = {frozenset(): 1.0}
    for _ in range(count):
        larger = collections.Counter()
        for drawn, probability in sets.items():
            left = set(range(len(p))) - drawn
            total = sum(p[i] for i in left)
            for i in left:
                larger[drawn | {i}] += probability * (p[i] / total if total else 1 / len(left))
        sets = {drawn: probability for drawn, probability in larger.items() if probability}
    return sets


def inclusion_probabilities(p, count):
    """[L], how likely each layer is among those drawn."""
    return np.array([sum(q for drawn, q in set_probabilities(p, count).items() if i in drawn) for i in range(len(p))])


def draws(p, count, sampler=sample_layers, n=DRAWS):
    """[n, L] bool."""
    keys = jax.random.split(KEY, n)
    return np.asarray(jax.jit(jax.vmap(lambda key: sampler(key, jnp.array(p), count)))(keys))


def agree(drawn, p, count):
    """Whether each layer's frequency is its probability π: within 5 binomial standard errors and 3 draws, exactly if
    π is 0 or 1.

    The 3 draws are for layers of which a few are expected, where the binomial is not normal. Elsewhere a right sampler
    exceeds 5 standard errors with probability 6e-7, in 86 frequencies that vary 5e-5.
    """
    expected = inclusion_probabilities(p, count)
    variance = expected * (1 - expected)
    tolerance = np.where(variance < 1e-12, 1e-9, 5 * np.sqrt(np.abs(variance) / len(drawn)) + 3 / len(drawn))
    return (np.abs(drawn.mean(axis=0) - expected) <= tolerance).all()


@pytest.mark.parametrize("name, count", SETTINGS)
def test_frequencies(name, count):
    drawn = draws(P[name], count)
    assert (drawn.sum(axis=1) == count).all()
    assert agree(drawn, P[name], count)
    positive = np.array(P[name]) > 0
    if count <= positive.sum():
        assert not drawn[:, ~positive].any()


def top(key, p, count):
    """Those with the largest p, as a newer library does."""
    return jnp.zeros(p.shape, bool).at[jax.lax.top_k(p, count)[1]].set(True)


def bernoulli(key, p, count):
    """Every layer by itself, `count` of them on average."""
    return jax.random.bernoulli(key, jnp.minimum(1, count * p))


def softmax(key, p, count):
    """Gumbel top-S on p in the place of log p."""
    return sample_layers(key, jax.nn.softmax(p), count)


@pytest.mark.parametrize(
    "name, count", [("graded", 3), ("geometric", 4), ("two large", 2), ("zeros", 2), ("near one", 2)])
@pytest.mark.parametrize("wrong", [top, bernoulli, softmax])
def test_wrong_samplers_are_told_apart(wrong, name, count):
    assert not agree(draws(P[name], count, wrong), P[name], count)


def test_inclusion_probabilities_by_hand():
    """Two of three layers: π_l = p_l + Σ_{k ≠ l} p_k p_l / (1 − p_k)."""
    np.testing.assert_allclose(
        inclusion_probabilities([0.5, 0.3, 0.2], 2),
        [0.5 + 0.3 * 0.5 / 0.7 + 0.2 * 0.5 / 0.8, 0.3 + 0.5 * 0.3 / 0.5 + 0.2 * 0.3 / 0.8,
         0.2 + 0.5 * 0.2 / 0.5 + 0.3 * 0.2 / 0.7], rtol=1e-14)
    np.testing.assert_allclose(inclusion_probabilities([0.5, 0.0, 0.5, 0.0], 3), [1, 0.5, 1, 0.5], rtol=1e-14)


@pytest.mark.parametrize("p", [[0.5, 0.3, 0.15, 0.05], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sets_have_numpys_distribution(p, count):
    """Frequencies of the drawn sets against those of successive draws, exactly; numpy's own against the same."""
    n, exact, rng = 8000, set_probabilities(p, count), np.random.default_rng(0)
    numpys = [frozenset(rng.choice(4, count, replace=False, p=p).tolist()) for _ in range(n)]
    ours = [frozenset(np.flatnonzero(row).tolist()) for row in draws(p, count, n=n)]
    for drawn in (ours, numpys):
        observed = collections.Counter(drawn)
        assert set(observed) <= set(exact)
        chi_squared = sum((observed[s] - n * q) ** 2 / (n * q) for s, q in exact.items())
        assert chi_squared < 25  # at most 5 degrees of freedom: passed with probability 0.9998


def test_all_layers():
    assert draws([0.7, 0.1, 0.1, 0.1], 4, n=20).all()
