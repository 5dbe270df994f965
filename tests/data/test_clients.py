"""Rows among clients: every row once, sizes as asked for, and labels as far from even as the split says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data.clients import client_sizes, parse_split, split_rows

SPLITS = ("iid", "sorted", "dirichlet:0.1", "dirichlet:100")


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 300), st.sampled_from(("equal", "unequal")))
def test_sizes(clients, more, kind):
    n = clients * clients + more
    sizes = client_sizes(n, clients, kind)
    assert sizes.sum() == n and sizes.min() >= 1
    shares = np.ones(clients) if kind == "equal" else np.arange(1, clients + 1)
    assert np.abs(sizes - n * shares / shares.sum()).max() <= 1


@settings(max_examples=50)
@given(st.integers(1, 8), st.integers(20, 90), st.sampled_from(SPLITS), st.integers(0, 2**32), st.data())
def test_every_row_is_somebodys(clients, n, split, seed, data):
    labels = data.draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n))
    sizes = client_sizes(n, clients)
    found = split_rows(labels, sizes, split, seed)
    assert [len(rows) for rows in found] == sizes.tolist()
    assert sorted(np.concatenate(found)) == list(range(n))
    again = split_rows(labels, sizes, split, seed)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def unevenness(split, seed):
    """Mean over clients of |part of label a − 1/2|; 0 to 1/2."""
    labels = np.array(["a", "b"] * 500)
    return np.mean([abs((labels[rows] == "a").mean() - 0.5) for rows in split_rows(labels, [50] * 20, split, seed)])


def test_how_uneven_splits_are():
    found = {split: np.mean([unevenness(split, seed) for seed in range(5)]) for split in SPLITS}
    assert found["sorted"] == 0.5
    assert found["iid"] == pytest.approx(np.sqrt(0.25 / 50 * 2 / np.pi), rel=0.3)  # of a binomial's mean deviation
    assert found["dirichlet:0.1"] > 0.35 and found["dirichlet:100"] < 0.1


def test_labels_go_to_other_clients_with_another_seed():
    labels = ["a"] * 50 + ["b"] * 50
    first = {tuple(rows.max() < 50 for rows in split_rows(labels, [10] * 10, "sorted", seed)) for seed in range(5)}
    assert len(first) > 1 and all(sum(of) == 5 for of in first)


@pytest.mark.parametrize("call, expected", [
    (lambda: client_sizes(5, 6), "n: found 5 rows for 6 clients"), (lambda: client_sizes(9, 2, "odd"), "sizes: found"),
    (lambda: split_rows("aabb", [2, 1], "iid", 0), "sizes: found 3 rows in all, expected 4"),
    (lambda: split_rows("abcd", [2, 2], "sorted", 0), "4 rows with 4 answers, expected iid"),
    *((lambda text=text: parse_split(text), "split: found .* expected iid, sorted or dirichlet:ALPHA")
      for text in ("", "even", "dirichlet", "dirichlet:0", "dirichlet:x", "iid:2", "sorted:1", "dirichlet:inf"))])
def test_errors(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()
