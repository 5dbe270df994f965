"""Figures that a model which judges reads off rows of tokens, in batches.

Shapes in names: B batch, T padded length, K figures of a row, N rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxvaccine.data.batching import pad_rows


def figures_of_rows(figures: Callable[[np.ndarray, np.ndarray], Any], rows: Sequence[np.ndarray], count: int, *,
                    batch_size: int, bucket: int, progress: bool, what: str) -> np.ndarray:
    """Each row's figures, float32 [N, K]; the longest rows are taken first.

    Args:
      figures: (input_ids [B, T], lengths [B], at least 1) -> [B, K]. Rows that fill a batch up have length 1, and
        nobody looks at their figures.
      rows: token ids, int32 [T_i], at least one each.
      count: K.
      batch_size, bucket: as of `pad_rows`.
      progress: shows a bar.
      what: the figures' name, for the error.

    Raises:
      FloatingPointError: a figure is not finite.
    """
    from tqdm import tqdm

    found_NxK = np.zeros((len(rows), count), np.float32)
    order = sorted(range(len(rows)), key=lambda i: -rows[i].size)
    with tqdm(total=len(rows), desc="judge", unit="answer", disable=not progress) as bar:
        for first in range(0, len(rows), batch_size):
            chosen = order[first:first + batch_size]
            input_ids_BxT, lengths_B = pad_rows([rows[i] for i in chosen], batch_size, bucket)
            found_NxK[chosen] = figures(input_ids_BxT, np.maximum(lengths_B, 1))[:len(chosen)]
            bar.update(len(chosen))
    wrong = np.flatnonzero(~np.isfinite(found_NxK).all(axis=1))
    if wrong.size:
        raise FloatingPointError(f"judge: the {what} of answer {wrong[0]} (from 0) are not finite: its weights or "
                                 "activations overflowed")
    return found_NxK
