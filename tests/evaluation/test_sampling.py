"""Drawing tokens: temperature, top-k and top-p against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.evaluation.sampling import GREEDY, Sampling, choose, keep_likely

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)) * 3, jnp.float32)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (7, 1.0), (50, 1.0), (99, 1.0), (0, 0.5), (0, 0.9),
                                          (0, 1e-9), (0, 0.999), (7, 0.5), (20, 0.9)])  # fmt: skip
def test_what_is_kept_equals_transformers(top_k, top_p):
    torch = pytest.importorskip("torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    expected = torch.tensor(np.asarray(LOGITS))
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    np.testing.assert_array_equal(keep_likely(LOGITS, top_k, top_p), expected.numpy())


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=3), Sampling(1.5, top_p=0.8)])
def test_draws_follow_the_probabilities(sampling):
    logits = jnp.array([2.0, 1.0, 0.5, 0.0, -1.0])
    n = 20_000
    rows = jnp.broadcast_to(logits, (n, 5))
    drawn, sound = choose(rows, jnp.arange(n), jnp.zeros(n, jnp.int32), sampling)
    expected = jax.nn.softmax(keep_likely(logits[None] / sampling.temperature, sampling.top_k, sampling.top_p))[0]
    found = np.bincount(drawn, minlength=5) / n
    assert sound.all() and np.abs(found - expected).max() < 4 * 0.5 / n**0.5
    assert (found[np.asarray(expected) == 0] == 0).all()


def test_positions_are_independent():
    rows = jnp.zeros((2000, 2))
    at = [np.asarray(choose(rows, jnp.arange(2000), jnp.full(2000, position), Sampling(1.0))[0]) for position in (0, 1)]
    assert abs(np.corrcoef(*at)[0, 1]) < 0.1


def test_greedy_and_logits_that_are_not_finite():
    broken = LOGITS.at[1, 3].set(jnp.nan).at[2, 4].set(jnp.inf).at[3, 5].set(-jnp.inf)
    for sampling in (GREEDY, Sampling(0.0, top_k=2, top_p=0.1), Sampling(1.0, top_p=0.5)):
        tokens, sound = choose(broken, jnp.arange(4), jnp.zeros(4, jnp.int32), sampling)
        assert sound.tolist() == [True, False, False, True] and tokens.dtype == jnp.int32
        if not sampling.temperature:
            assert tokens[0] == LOGITS[0].argmax() and tokens[3] == LOGITS[3].argmax()


@settings(max_examples=60)
@given(st.lists(st.sampled_from([-jnp.inf, -2.0, 0.0, 1.0, 3.0]), min_size=6, max_size=6))
def test_the_first_of_the_largest(row):
    logits = jnp.array([row])
    token, _ = choose(logits, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), GREEDY)
    assert token == jnp.argmax(logits)


@pytest.mark.parametrize("field, value", [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0),
    ("top_p", 1.01), ("seed", -1), ("seed", 2**32),
])  # fmt: skip
def test_bad_settings(field, value):
    with pytest.raises(ValueError, match=f"sampling: {field}: found {value}, expected"):
        Sampling(**{field: value})
