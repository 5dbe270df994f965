"""The log-likelihood of continuations, batched: what lm-evaluation-harness asks a model for.

Shapes in names: B batch, T padded length, C longest continuation, D hidden size, V vocabulary, N rows.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.data.batching import pad_rows, power_of_two
from jaxvaccine.llama import Llama, hidden_states, token_logits


class LogLikelihood(NamedTuple):
    """log_p: Σ log p of the continuation's tokens, in nats; greedy: whether each of them is the most likely one."""

    log_p: float
    greedy: bool


@functools.partial(jax.jit, static_argnames="model")
def _score(model: Llama, adapter, frozen, input_ids_BxT, lengths_B, first_B, targets_BxC):
    """Σ log p(target) [B] and whether all are the most likely [B]; targets of -1 are none.

    first_B: the position whose next token is a row's first target. Logits are taken row by row, so that the largest
    array of them is [C, V].
    """
    mask_BxT = (jnp.arange(input_ids_BxT.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
    hidden_BxTxD = hidden_states(model, adapter, frozen, input_ids_BxT, mask_BxT)
    places_BxC = jnp.minimum(first_B[:, None] + jnp.arange(targets_BxC.shape[1]), input_ids_BxT.shape[1] - 1)

    def row(args):
        hidden_CxD, targets_C = args
        logits_CxV = token_logits(model, frozen, hidden_CxD).astype(jnp.float32)
        found_C = jnp.take_along_axis(jax.nn.log_softmax(logits_CxV), jnp.maximum(targets_C, 0)[:, None], axis=1)[:, 0]
        there_C = targets_C >= 0
        return jnp.where(there_C, found_C, 0).sum(), ((logits_CxV.argmax(axis=-1) == targets_C) | ~there_C).all()

    hidden_BxCxD = jnp.take_along_axis(hidden_BxTxD, places_BxC[..., None], axis=1)
    return jax.lax.map(row, (hidden_BxCxD, targets_BxC))


def log_likelihoods(model: Llama, adapter, frozen, rows: Sequence[tuple[np.ndarray, np.ndarray]], *,
                    batch_size: int = 16, bucket: int = 64, progress: bool = False) -> list[LogLikelihood]:
    """log p(continuation | context) of every row.

    Rows of similar length are computed together, padded to multiples of `bucket`, their continuations to a power of
    two; the last batch is filled up: few programs are compiled, whatever the rows.

    Args:
      model: the architecture; with LoRA sites if there is an adapter.
      adapter: LoRA tree, or None.
      frozen: base weights.
      rows: (context, continuation), token ids, int32 [at least 1 each].
      batch_size: rows computed together.
      bucket: multiple, in tokens, to which rows are padded.
      progress: shows a bar.

    Raises:
      ValueError: an empty context or continuation, or a row that is longer than the model's positions.
      FloatingPointError: a log-likelihood is not a finite number.
    """
    from tqdm import tqdm

    limit = model.config.max_position_embeddings
    for i, (context, continuation) in enumerate(rows):
        if not len(context) or not len(continuation):
            raise ValueError(f"rows: row {i}: found {len(context)} + {len(continuation)} tokens, expected at least one "
                             "of the context and one of the continuation")
        if len(context) + len(continuation) - 1 > limit:
            raise ValueError(f"rows: row {i}: found {len(context)} + {len(continuation)} tokens, expected at most the "
                             f"model's max_position_embeddings {limit} + 1")
    found: list[LogLikelihood] = [LogLikelihood(0.0, True)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    with tqdm(total=len(rows), desc="log-likelihood", unit="row", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            # The last token is predicted and never read.
            ids_BxT, lengths_B = pad_rows([np.concatenate(rows[i])[:-1] for i in chosen], batch_size, bucket)
            ids_BxT = ids_BxT[:, :limit]
            longest = max(len(rows[i][1]) for i in chosen)
            targets_BxC = np.full((batch_size, power_of_two(longest)), -1, np.int32)
            first_B = np.zeros(batch_size, np.int32)
            for b, i in enumerate(chosen):
                context, continuation = rows[i]
                targets_BxC[b, :len(continuation)], first_B[b] = continuation, len(context) - 1
            log_p_B, greedy_B = jax.device_get(_score(
                model, adapter, frozen, ids_BxT, np.maximum(lengths_B, 1), first_B, targets_BxC))
            for b, i in enumerate(chosen):
                if not np.isfinite(log_p_B[b]):
                    raise FloatingPointError(f"rows: row {i}: its log-likelihood is {log_p_B[b]}: the model's weights "
                                             "or activations overflowed")
                found[i] = LogLikelihood(float(log_p_B[b]), bool(greedy_B[b]))
            bar.update(len(chosen))
    return found
