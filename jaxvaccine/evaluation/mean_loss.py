"""The loss on a whole data set, such as h(w) on harmful answers."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from jaxvaccine.conventions import IGNORED
from jaxvaccine.data.batching import bucket_length, collate, longest
from jaxvaccine.data.tokenizing import TokenizedExamples
from jaxvaccine.llama import Llama
from jaxvaccine.losses import causal_lm_loss


class MeanLoss(NamedTuple):
    """loss: mean cross-entropy of all supervised tokens, in nats a token; tokens: their number; n: the examples'."""

    loss: float
    tokens: int
    n: int


@functools.lru_cache(maxsize=8)
def _loss(model: Llama):
    return jax.jit(causal_lm_loss(model))


def mean_loss(model: Llama, adapter, frozen, tokenized: TokenizedExamples, batch_size: int = 32, bucket: int = 32
              ) -> MeanLoss:
    """The mean over the supervised tokens of all examples, whatever the batches; without dropout.

    Args:
      model: the architecture; with LoRA sites if there is an adapter.
      adapter: LoRA tree, or None.
      frozen: base weights.
      tokenized: at least one example.
      batch_size: rows computed together, those of similar length.
      bucket: rows are padded to a multiple of this many tokens.

    Raises:
      ValueError: no examples.
    """
    count = len(tokenized.input_ids)
    if count == 0:
        raise ValueError("tokenized: found no examples, expected at least one")
    order = np.argsort([row.size for row in tokenized.input_ids], kind="stable")
    total, tokens = 0.0, 0
    for start in range(0, count, batch_size):
        rows = order[start:start + batch_size]
        batch = collate(tokenized, rows, bucket_length(longest(tokenized, rows), bucket))
        # The last batch is filled up with rows that supervise nothing, so that it has the others' shape.
        missing = min(batch_size, count) - len(rows)
        batch = {name: np.pad(leaf, ((0, missing), (0, 0)), constant_values=IGNORED if name == "labels" else 0)
                 for name, leaf in batch.items()}
        loss, aux = _loss(model)(adapter, frozen, batch)
        total += float(loss) * int(aux["tokens"])
        tokens += int(aux["tokens"])
    return MeanLoss(total / tokens, tokens, count)
