import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data.batching import (
    MOST_SHAPES,
    batch_indices,
    batch_lengths,
    bucket_length,
    check_batch,
    collate,
    pad_rows,
    run_indices,
    steps_for,
    stream_seed,
    training_batches,
)
from jaxvaccine.data.tokenizing import TokenizedExamples

few = settings(max_examples=25)


def tokenized(lengths, prompts=None):
    rows = tuple(np.arange(1, n + 1, dtype=np.int32) + 100 * i for i, n in enumerate(lengths))
    return TokenizedExamples(rows, np.asarray(prompts or [1] * len(lengths), np.int32))


@few
@given(st.integers(0, 5000), st.integers(1, 200))
def test_bucket_is_the_next_multiple(n, multiple):
    length = bucket_length(n, multiple)
    assert length % multiple == 0 and length >= max(n, 1) and length - max(n, 1) < multiple


@few
@given(st.lists(st.integers(2, 90), min_size=1, max_size=6), st.data())
def test_collate_round_trip(lengths, data):
    prompts = [data.draw(st.integers(1, n - 1)) for n in lengths]
    source = tokenized(lengths, prompts)
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
    batch = collate(source, indices)
    check_batch(batch)
    assert batch["input_ids"].shape == (len(indices), bucket_length(max(lengths[i] for i in indices)))
    for row, i in enumerate(indices):
        n, prompt = lengths[i], prompts[i]
        assert batch["attention_mask"][row].sum() == n
        np.testing.assert_array_equal(batch["input_ids"][row, :n], source.input_ids[i])
        np.testing.assert_array_equal(batch["labels"][row, prompt:n], source.input_ids[i][prompt:])
        assert (batch["labels"][row, :prompt] == -100).all() and (batch["labels"][row, n:] == -100).all()
        assert all(array.dtype == np.int32 for array in batch.values())


def test_collate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="length: found 4, expected at least 5"):
        collate(tokenized([3, 5]), [0, 1], 4)
    with pytest.raises(ValueError, match="indices: found none"):
        collate(tokenized([3]), [])


@few
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**63), st.integers(1, 4))
def test_stream_is_a_permutation_per_epoch(n, batch_size, seed, epochs):
    steps = -(-n * epochs // batch_size)
    stream = np.concatenate([batch_indices(n, batch_size, s, seed) for s in range(steps)])
    assert len(stream) == steps * batch_size
    for epoch in range(epochs):
        piece = stream[epoch * n : (epoch + 1) * n]
        assert sorted(piece) == list(range(n))
        np.testing.assert_array_equal(piece, np.random.default_rng([seed, epoch]).permutation(n))


@few
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 12),
       st.integers(0, 2**63))
def test_turns(turns, batch_size, steps, seed):
    """The same rows as often, in the order of their turns, and within a turn in the order without."""
    mixed = run_indices(len(turns), batch_size, steps, seed)
    np.testing.assert_array_equal(mixed, [batch_indices(len(turns), batch_size, s, seed) for s in range(steps)])
    found = run_indices(len(turns), batch_size, steps, seed, np.array(turns))
    expected = sorted(mixed.reshape(-1), key=lambda i: turns[i])  # sorted is stable
    np.testing.assert_array_equal(found.reshape(-1), expected)


def test_batches_in_turns():
    """A function of the step, whatever was asked for before; padded to what its rows need; others stay as they are."""
    rows = tokenized([3, 5, 9, 4, 6, 2, 30])._replace(turns=np.array([0, 1, 0, 1, 1, 1, 0]))
    sources = {"user": (rows, 2), "alignment": (tokenized([4, 5, 6]), 2)}
    lengths = batch_lengths([sources], [5], 8, 14)
    stream = training_batches(sources, 5, 8, lengths)
    in_order = [stream(step) for step in range(14)]
    again = training_batches(sources, 5, 8, lengths)
    for step in (13, 3, 0, 3):
        for name in sources:
            np.testing.assert_array_equal(again(step)[name]["input_ids"], in_order[step][name]["input_ids"])
    seen = [int(mask.sum()) for batch in in_order for mask in batch["user"]["attention_mask"]]
    assert sorted(seen) == sorted(4 * [3, 5, 9, 4, 6, 2, 30])
    assert set(seen[:12]) == {3, 9, 30} and not set(seen[12:]) & {3, 9, 30}
    mixed = {**sources, "user": (rows._replace(turns=None), 2)}
    plain = training_batches(mixed, 5, 8, batch_lengths([mixed], [5], 8, 14))
    for step in range(14):
        width = min(of(step)["alignment"]["input_ids"].shape[1] for of in (plain, stream))
        np.testing.assert_array_equal(*(of(step)["alignment"]["input_ids"][:, :width] for of in (plain, stream)))
    with pytest.raises(ValueError, match=r"sources\['user'\]: found examples with turns and no lengths"):
        training_batches(sources, 5, 8)


def test_batches_depend_on_the_step_alone():
    in_order = [batch_indices(10, 4, s, 3) for s in range(30)]
    for step in (29, 7, 0, 7):
        np.testing.assert_array_equal(batch_indices(10, 4, step, 3), in_order[step])
    assert len(batch_indices(3, 10, 5, 0)) == 10
    assert (batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 0, 1)).any()


@pytest.mark.parametrize("field", ["n", "batch_size", "step", "seed"])
def test_batch_indices_names_the_argument(field):
    arguments = {"n": 5, "batch_size": 2, "step": 0, "seed": 0} | {field: -1}
    with pytest.raises(ValueError, match=f"{field}: found -1"):
        batch_indices(**arguments)


@pytest.mark.parametrize(
    ("n", "batch_size", "epochs", "steps"),
    [(5000, 10, 20, 10000), (7, 10, 1, 1), (7, 3, 1, 3), (30, 10, 0.1, 1), (1000, 10, 0.5, 50), (30, 1, 0.1, 3)],
)
def test_steps_for(n, batch_size, epochs, steps):
    assert steps_for(n, batch_size, epochs) == steps


@pytest.mark.parametrize("epochs", [0, -1, float("nan"), float("inf")])
def test_steps_for_refuses(epochs):
    with pytest.raises(ValueError, match="epochs"):
        steps_for(5, 2, epochs)


def sources():
    return {"alignment": (tokenized([3, 70, 9, 10, 4]), 2), "harmful": (tokenized([5, 5, 140]), 3)}


def test_sources_share_one_length_per_step():
    batches = training_batches(sources(), seed=1)
    seen = set()
    for step in range(10):
        alignment, harmful = (batches(step)[name] for name in ("alignment", "harmful"))
        assert alignment["input_ids"].shape[0] == 2 and harmful["input_ids"].shape[0] == 3
        assert alignment["input_ids"].shape[1] == harmful["input_ids"].shape[1]
        check_batch(alignment), check_batch(harmful)
        longest = max(b["attention_mask"].sum(1).max() for b in (alignment, harmful))
        assert alignment["input_ids"].shape[1] == bucket_length(longest)
        seen.add(alignment["input_ids"].shape[1])
    assert seen == {192}, "a batch of all three harmful rows always has the longest"


ROWS = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@given(alignment=ROWS, harmful=ROWS, sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), bucket=st.integers(1, 16),
       steps=st.integers(1, 12), seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3))
@settings(max_examples=100)
def test_batches_of_their_own_lengths(alignment, harmful, sizes, bucket, steps, seeds):
    """Every batch has room, none more than it needs for less compilation, and no sum is larger than with one length."""
    of = {"alignment": (tokenized(alignment), sizes[0]), "harmful": (tokenized(harmful), sizes[1])}
    lengths = batch_lengths([of] * len(seeds), seeds, bucket, steps)
    common = np.zeros(steps, int)
    for seed in seeds:
        found = training_batches(of, seed, bucket, lengths)
        plain = training_batches(of, seed, bucket)
        for step in range(steps):
            one, other = found(step), plain(step)
            common[step] = max(common[step], other["alignment"]["input_ids"].shape[1])
            for name in of:
                check_batch(one[name])
                assert one[name]["input_ids"].shape == (of[name][1], lengths[name][step])
                kept = one[name]["attention_mask"].sum()
                assert kept == other[name]["attention_mask"].sum()
    assert all((found % bucket == 0).all() and found.max() <= common.max() for found in lengths.values())
    shapes = set(zip(*(found.tolist() for found in lengths.values()), strict=True))
    assert len(shapes) <= len(set(common.tolist()))
    tokens = sum((lengths[name] * of[name][1]).sum() for name in of)
    assert tokens <= common.sum() * sum(sizes)


def test_lengths_of_short_refusals():
    """The case for which lengths are their own: one source is short, the other long."""
    of = {"alignment": (tokenized([5, 6, 7]), 2), "harmful": (tokenized([100, 60, 30, 20]), 2)}
    lengths = batch_lengths([of], [0], 16, 50)
    assert set(lengths["alignment"]) == {16}
    assert set(lengths["harmful"]) == {32, 64, 112}


def test_lengths_of_batches_that_go_together():
    """Harmless answers are compared with harmful ones position by position; Lisa takes either of two batches."""
    of = {"harmful": (tokenized([30, 3]), 1), "harmless": (tokenized([3, 50]), 1), "alignment": (tokenized([9]), 1)}
    lengths = batch_lengths([of], [0], 8, 6)
    np.testing.assert_array_equal(lengths["harmful"], lengths["harmless"])
    assert set(lengths["alignment"]) == {16}
    of = {"user": (tokenized([30, 3]), 1), "alignment": (tokenized([9, 70]), 1)}
    lengths = batch_lengths([of], [0], 8, 6)
    np.testing.assert_array_equal(lengths["user"], lengths["alignment"])


def test_many_lengths(monkeypatch):
    """Where combinations are too many to be compared, those of one longest length are one."""
    rng = np.random.default_rng(0)
    of = {name: (tokenized(rng.integers(2, 300, 400).tolist()), 1) for name in ("alignment", "harmful")}
    lengths = batch_lengths([of], [0], 1, 400)
    longest = np.maximum(*lengths.values())
    shapes = set(zip(*(found.tolist() for found in lengths.values()), strict=True))
    assert MOST_SHAPES > len(shapes) == len(set(longest.tolist()))


def test_sources_are_independent_streams():
    both = training_batches(sources(), seed=1)
    alone = training_batches({"alignment": sources()["alignment"]}, seed=1)
    same = TokenizedExamples(*sources()["alignment"][0])
    twins = training_batches({"alignment": (same, 2), "harmful": (same, 2)}, seed=1)
    different = 0
    for step in range(20):
        a, b = both(step)["alignment"]["input_ids"], alone(step)["alignment"]["input_ids"]
        np.testing.assert_array_equal(a[:, : b.shape[1]], b)
        pair = twins(step)
        different += int((pair["alignment"]["input_ids"] != pair["harmful"]["input_ids"]).any())
    assert different > 10


def test_stream_seed_is_the_same_in_another_process():
    code = "from jaxvaccine.data.batching import stream_seed; print(stream_seed(7, 'harmful'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=None).stdout
    assert int(out) == stream_seed(7, "harmful") == 505823717898520321
    assert stream_seed(7, "harmful") != stream_seed(8, "harmful") != stream_seed(7, "alignment")


def test_streams_in_the_order_of_another():
    """A harmless answer comes with the harmful one to its prompt; the user's data as runs have always drawn it."""
    rows = (tokenized([3, 4, 5, 6, 7]), 2)
    batches = training_batches({"harmful": rows, "harmless": rows}, seed=1)
    for step in range(4):
        found = batches(step)
        np.testing.assert_array_equal(found["harmful"]["input_ids"], found["harmless"]["input_ids"])
    user, plain = (training_batches({name: rows}, seed=1) for name in ("user", "alignment"))
    np.testing.assert_array_equal(user(3)["user"]["input_ids"], plain(3)["alignment"]["input_ids"])
    user = training_batches({"user": (tokenized([1] * 7), 2)}, seed=1)
    drawn = [(user(step)["user"]["input_ids"][:, 0] // 100).tolist() for step in range(5)]
    assert drawn == [[5, 4], [3, 1], [0, 6], [2, 1], [5, 3]]


def test_training_batches_refuses_empty_sources():
    with pytest.raises(ValueError, match="found none"):
        training_batches({}, 0)
    with pytest.raises(ValueError, match=r"sources\['harmful'\]: found 1 examples, batch size 0"):
        training_batches({"harmful": (tokenized([3]), 0)}, 0)


def batch(**changes):
    good = {
        "input_ids": np.array([[5, 6, 7, 0]], np.int32),
        "labels": np.array([[-100, 6, 7, -100]], np.int32),
        "attention_mask": np.array([[1, 1, 1, 0]], np.int32),
    }
    return {k: v for k, v in (good | changes).items() if v is not None}


def test_a_good_batch_passes():
    check_batch(batch())
    check_batch(batch(), vocab_size=8)
    check_batch(batch(labels=np.array([[5, -100, 7, -100]], np.int32)))


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        ({"labels": None}, None, r"batch: found keys \['attention_mask', 'input_ids'\], expected"),
        ({"extra": np.zeros((1, 4))}, None, "found keys .*extra"),
        ({"input_ids": np.zeros(4, np.int32)}, None, r"'input_ids'\]: found shape \(4,\), expected \[B, T\]"),
        ({"labels": np.zeros((1, 3), np.int32)}, None, r"'labels'\]: found shape \(1, 3\), expected \(1, 4\)"),
        ({"attention_mask": np.ones((1, 4), np.float32)}, None, r"'attention_mask'\]: found dtype float32"),
        ({"attention_mask": np.array([[0, 1, 1, 1]])}, None, "found a 1 after a 0 in row 0 at position 1"),
        ({"attention_mask": np.array([[1, 1, 1, 2]])}, None, r"'attention_mask'\]\[\(0, 3\)\]: found 2"),
        ({"labels": np.full((1, 4), -100)}, None, "no supervised label"),
        ({"labels": np.array([[5, -100, -100, -100]])}, None, "no supervised label"),
        ({"labels": np.array([[-100, 6, -1, -100]])}, None, r"'labels'\]\[\(0, 2\)\]: found -1"),
        ({"labels": np.array([[-100, 6, 7, 7]])}, None, r"'labels'\]\[\(0, 3\)\]: found 7 on padding"),
        ({}, 7, r"'input_ids'\]\[\(0, 2\)\]: found 7, expected 0 <= id < 7"),
        ({"labels": np.array([[-100, 6, 8, -100]])}, 8, r"\(0, 2\)\]: found 8, expected 0 <= id < 8, or -100"),
    ],
)  # fmt: skip
def test_bad_batches(changes, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        check_batch(batch(**changes), vocab_size)


def test_pad_rows():
    ids, lengths = pad_rows([np.arange(1, 6), np.arange(7, 9)], count=3, multiple=4)
    assert ids.dtype == lengths.dtype == np.int32
    np.testing.assert_array_equal(ids, [[1, 2, 3, 4, 5, 0, 0, 0], [7, 8, 0, 0, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(lengths, [5, 2, 0])
