"""Padded batches in Hugging Face's convention, and the order in which examples are seen: a pure function of the step.

A batch is {"input_ids": [B, T] int32, "labels": [B, T] int32 (-100 = not supervised), "attention_mask": [B, T] int32},
right-padded; the label at position i is the token at position i, and position i predicts label i + 1.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxvaccine.conventions import IGNORED
from jaxvaccine.data.tokenizing import TokenizedExamples

Batch = dict[str, np.ndarray]
KEYS = ("input_ids", "labels", "attention_mask")
# Streams that are drawn in the order of another: harmless answers go with the harmful ones to the same prompts, and the
# user's data keeps the order of the runs in which it was still called "alignment", with and without a defense. Their
# batches have one length too: answers are compared position by position, and Lisa takes either batch.
SAME_ORDER = {"harmless": "harmful", "user": "alignment"}


def bucket_length(n: int, multiple: int = 64) -> int:
    """n rounded up to a multiple, at least one: the padded lengths that a step is compiled for."""
    if multiple < 1:
        raise ValueError(f"multiple: found {multiple}, expected at least 1")
    return max(1, -(-n // multiple)) * multiple


def power_of_two(n: int) -> int:
    """n rounded up to a power of two, at least one: few programs are compiled, whatever the numbers."""
    return 1 << max(n - 1, 0).bit_length()


def pad_rows(rows: Sequence[np.ndarray], count: int, multiple: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [count, T], right-padded with 0 to the bucket of the longest row, and lengths int32 [count].

    Rows beyond those given are filler of length 0, so that a last, smaller batch has the shape of the others.
    """
    lengths = np.zeros(count, np.int32)
    lengths[:len(rows)] = [row.size for row in rows]
    ids = np.zeros((count, bucket_length(int(lengths.max()), multiple)), np.int32)
    for i, row in enumerate(rows):
        ids[i, :row.size] = row
    return ids, lengths


def longest(tokenized: TokenizedExamples, indices: Sequence[int] | np.ndarray) -> int:
    """The number of tokens of the longest of the given rows."""
    return max(len(tokenized.input_ids[i]) for i in indices)


def collate(tokenized: TokenizedExamples, indices: Sequence[int] | np.ndarray, length: int | None = None) -> Batch:
    """The rows `indices` as one batch [len(indices), length]; length None is the bucket of the longest row.

    Padding has id 0, which any vocabulary has, label -100 and mask 0.

    Raises:
      ValueError: no rows, or a row that is longer than length.
    """
    if len(indices) == 0:
        raise ValueError("indices: found none, expected at least one row")
    needed = longest(tokenized, indices)
    if length is None:
        length = bucket_length(needed)
    if needed > length:
        raise ValueError(f"length: found {length}, expected at least {needed}, the longest row's tokens")
    shape = (len(indices), length)
    batch = {
        "input_ids": np.zeros(shape, np.int32),
        "labels": np.full(shape, IGNORED, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
    }
    for row, i in enumerate(indices):
        ids, prompt = tokenized.input_ids[i], int(tokenized.prompt_lengths[i])
        batch["input_ids"][row, : len(ids)] = ids
        batch["labels"][row, prompt : len(ids)] = ids[prompt:]
        if tokenized.learnt is not None:
            batch["labels"][row, : len(ids)][~tokenized.learnt[i]] = IGNORED
        batch["attention_mask"][row, : len(ids)] = 1
    return batch


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Which of n examples step `step` (from 0) trains on: [batch_size] int64, a pure function of its arguments.

    The stream of examples is one permutation per epoch after another, epoch e's from numpy's default_rng([seed, e]);
    a batch is a consecutive piece of it and may span epochs. So every example is seen equally often, and a run can be
    resumed at any step without state.
    """
    for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("step", step, 0), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: found {value}, expected at least {least}")
    return _stream(n, seed, step * batch_size, (step + 1) * batch_size)


def run_indices(n: int, batch_size: int, steps: int, seed: int, turns: np.ndarray | None = None) -> np.ndarray:
    """Which of n examples every step of a run trains on: [steps, batch_size] int64, a pure function of its arguments.

    Without turns its rows are those of `batch_indices`. With them it has the same examples as often, in the same order
    among those of one turn, and all of a smaller turn before any of a larger one.

    turns: [n] int, as of `TokenizedExamples`.
    """
    stream = _stream(n, seed, 0, steps * batch_size)
    if turns is not None:
        stream = stream[np.argsort(turns[stream], kind="stable")]
    return stream.reshape(steps, batch_size)


def _stream(n: int, seed: int, first: int, last: int) -> np.ndarray:
    epochs = range(first // n, (last - 1) // n + 1)
    stream = np.concatenate([np.random.default_rng([seed, e]).permutation(n) for e in epochs])
    return stream[first - epochs[0] * n : last - epochs[0] * n]


def steps_for(n: int, batch_size: int, epochs: float) -> int:
    """The number of batches in which each of n examples has been seen `epochs` times (the last may see some again)."""
    if n < 1 or batch_size < 1 or not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(
            f"n, batch_size, epochs: found {n}, {batch_size}, {epochs}, expected at least 1, at least 1, above 0"
        )
    # 0.1 epochs of 30 examples are 3 of them, not 3.0000000000000004.
    return max(1, math.ceil(round(n * epochs / batch_size, 9)))


def stream_seed(seed: int, name: str) -> int:
    """An independent seed for the stream `name` of a run, the same on every machine (Python's hash() is not)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def batch_lengths(sources: Sequence[Mapping[str, tuple[TokenizedExamples, int]]], seeds: Sequence[int], bucket: int,
                  steps: int) -> dict[str, np.ndarray]:
    """{name: [steps] int64}: to which length the batch of each step is padded.

    A common length of a step's batches would cost whatever reads the shorter one, so that each has its own. A step is
    compiled for every combination of lengths: there are no more of them here than there would be common lengths.

    Args:
      sources: of `training_batches`, of all runs that are trained at once; they have the same names and sizes.
      seeds: of these runs.
      bucket: lengths are multiples of it.
      steps: how many steps the runs make.
    """
    groups = sorted({_order(name) for name in sources[0]})
    needed, rows = np.full((steps, len(groups)), bucket), np.zeros(len(groups), int)
    for name, (_, size) in sources[0].items():
        rows[groups.index(_order(name))] += size
    for of, seed in zip(sources, seeds, strict=True):
        for name, (examples, size) in of.items():
            column = needed[:, groups.index(_order(name))]
            lengths = np.array([len(ids) for ids in examples.input_ids])
            stream = run_indices(len(lengths), size, steps, stream_seed(seed, _order(name)), examples.turns)
            np.maximum(column, -(-lengths[stream].max(axis=1) // bucket) * bucket, out=column)
    chosen = _fewer_shapes(needed, rows)
    return {name: chosen[:, groups.index(_order(name))] for name in sources[0]}


def _order(name: str) -> str:
    return SAME_ORDER.get(name, name)


# Of more combinations than these, as with --bucket=1, not every two are tried.
MOST_SHAPES = 256


def _fewer_shapes(needed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """needed [steps, G] raised until it has no more different rows than its rows have different maxima.

    Args:
      needed: what each step needs of each column.
      rows: [G] int, the cost of 1 in each column.
    """
    longest = needed.max(axis=1)
    classes = np.unique(longest)
    by_longest = needed.copy()
    for length in classes:
        by_longest[longest == length] = needed[longest == length].max(axis=0)
    shapes, of_step, counts = np.unique(needed, axis=0, return_inverse=True, return_counts=True)
    if len(shapes) > MOST_SHAPES:
        return by_longest
    # Again and again the two shapes become one that together cost least.
    clusters = [(shape, count, [i]) for i, (shape, count) in enumerate(zip(shapes, counts, strict=True))]
    while len(clusters) > len(classes):
        of, times = np.array([shape for shape, *_ in clusters]), np.array([count for _, count, _ in clusters])
        joint = np.maximum(of[:, None], of[None]) @ rows
        added = (joint - (of @ rows)[:, None]) * times[:, None]
        added = (added + added.T).astype(float)
        np.fill_diagonal(added, np.inf)
        i, j = np.unravel_index(added.argmin(), added.shape)
        (a, m, first), (b, n, second) = clusters[i], clusters[j]
        clusters = [cluster for k, cluster in enumerate(clusters) if k not in (i, j)]
        clusters.append((np.maximum(a, b), m + n, first + second))
    merged = shapes.copy()
    for shape, _, members in clusters:
        merged[members] = shape
    merged = merged[of_step.reshape(-1)]
    return min(merged, by_longest, key=lambda found: (found @ rows).sum())


def training_batches(
    sources: Mapping[str, tuple[TokenizedExamples, int]], seed: int, bucket: int = 64,
    lengths: Mapping[str, np.ndarray] | None = None,
) -> Callable[[int], dict[str, Batch]]:
    """Maps a step number (from 0) to {name: batch} for sources {name: (examples, batch size)}.

    Every source is a stream of its own (see batch_indices), its seed made from `seed` and its name, so that leaving one
    out does not change the others; those in SAME_ORDER take another's.

    Args:
      sources: what is drawn from.
      seed: of the run.
      bucket: lengths are multiples of it.
      lengths: as of `batch_lengths`. Without them all batches of a step have one, the bucket of the longest row in any.
        They say how many steps the run has, which examples with turns need.
    """
    if not sources:
        raise ValueError("sources: found none, expected at least one")
    for name, (data, batch_size) in sources.items():
        if not data.input_ids or batch_size < 1:
            raise ValueError(
                f"sources[{name!r}]: found {len(data.input_ids)} examples, batch size {batch_size}, "
                "expected at least 1 of both"
            )
        if data.turns is not None and lengths is None:
            raise ValueError(f"sources[{name!r}]: found examples with turns and no lengths, expected one for each "
                             "of the run's steps")
    seeds = {name: stream_seed(seed, _order(name)) for name in sources}
    in_turns = {name: run_indices(len(data.input_ids), batch_size, len(lengths[name]), seeds[name], data.turns)
                for name, (data, batch_size) in sources.items() if data.turns is not None}

    def indices(name: str, step: int) -> np.ndarray:
        if name in in_turns:
            return in_turns[name][step]
        data, batch_size = sources[name]
        return batch_indices(len(data.input_ids), batch_size, step, seeds[name])

    def batches(step: int) -> dict[str, Batch]:
        rows = {name: indices(name, step) for name in sources}
        if lengths is None:
            common = bucket_length(max(longest(sources[name][0], i) for name, i in rows.items()), bucket)
            padded = dict.fromkeys(rows, common)
        else:
            padded = {name: int(lengths[name][step]) for name in rows}
        return {name: collate(sources[name][0], i, padded[name]) for name, i in rows.items()}

    return batches


def check_batch(batch: Mapping[str, np.ndarray], vocab_size: int | None = None) -> None:
    """Checks a batch on the host, before a compiled step would turn its mistakes into a NaN or a wrong loss.

    Raises:
      ValueError: missing or unknown keys, shapes other than one [B, T], dtypes other than integers, padding that is
        not on the right, ids or labels outside [0, vocab_size) (labels may be -100), supervised padding, or no
        supervised label anywhere (a label at position 0 does not count: no position predicts it).
    """
    if set(batch) != set(KEYS):
        raise ValueError(f"batch: found keys {sorted(batch)}, expected {sorted(KEYS)}")
    arrays = {key: np.asarray(batch[key]) for key in KEYS}
    shape = arrays["input_ids"].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"batch['input_ids']: found shape {shape}, expected [B, T] with B, T at least 1")
    for key, array in arrays.items():
        if array.shape != shape:
            raise ValueError(f"batch[{key!r}]: found shape {array.shape}, expected {shape} as of 'input_ids'")
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"batch[{key!r}]: found dtype {array.dtype}, expected int32")
    mask, labels, ids = arrays["attention_mask"], arrays["labels"], arrays["input_ids"]
    if bad := _first((mask != 0) & (mask != 1)):
        raise ValueError(f"batch['attention_mask'][{bad}]: found {mask[bad]}, expected 0 or 1")
    if bad := _first(np.diff(mask.astype(np.int8), axis=1) > 0):
        raise ValueError(
            f"batch['attention_mask']: found a 1 after a 0 in row {bad[0]} at position {bad[1] + 1}, expected right "
            "padding (ones, then zeros)"
        )
    supervised = labels != IGNORED
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    expected = "at least 0" if vocab_size is None else f"0 <= id < {vocab_size}"
    for key, wrong, also in (
        ("input_ids", (ids < 0) | (ids >= limit), ""),
        ("labels", supervised & ((labels < 0) | (labels >= limit)), f", or {IGNORED}"),
    ):
        if bad := _first(wrong):
            raise ValueError(f"batch[{key!r}][{bad}]: found {arrays[key][bad]}, expected {expected}{also}")
    if bad := _first(supervised & (mask == 0)):
        raise ValueError(f"batch['labels'][{bad}]: found {labels[bad]} on padding, expected {IGNORED}")
    if not supervised[:, 1:].any():
        raise ValueError(
            f"batch['labels']: found no supervised label in {shape[0]} rows, expected at least one that is not "
            f"{IGNORED} (position 0 does not count, nothing predicts it)"
        )


def _first(wrong: np.ndarray) -> tuple[int, int] | None:
    found = np.argwhere(wrong)
    return (int(found[0][0]), int(found[0][1])) if len(found) else None
