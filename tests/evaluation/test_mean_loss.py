"""The loss on a data set against one row at a time, in NumPy from the logits."""

import jax
import numpy as np
import pytest

from jaxvaccine import llama
from jaxvaccine.data import TokenizedExamples
from jaxvaccine.evaluation import mean_loss
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_mean_over_tokens_of_all_examples(batch_size):
    model = tiny.model()
    adapter, frozen = tiny.trees(model)

    @jax.jit
    def log_probabilities(ids, mask):
        hidden = llama.hidden_states(model, adapter, frozen, ids[None], mask[None])
        return jax.nn.log_softmax(llama.token_logits(model, frozen, hidden[0]))

    rng = np.random.default_rng(0)
    lengths = (2, 40, 7, 33, 7)
    rows = TokenizedExamples(tuple(rng.integers(0, model.config.vocab_size, n).astype(np.int32) for n in lengths),
                             np.array([1, 30, 3, 2, 6], np.int32))
    total, tokens = 0.0, 0
    for ids, start in zip(rows.input_ids, rows.prompt_lengths, strict=True):
        # One length for all, so that one program is compiled.
        padding = max(lengths) - len(ids)
        log_p = np.asarray(log_probabilities(np.pad(ids, (0, padding)), np.pad(np.ones_like(ids), (0, padding))),
                           np.float64)
        total -= sum(log_p[i - 1, ids[i]] for i in range(start, len(ids)))
        tokens += len(ids) - start
    found = mean_loss(model, adapter, frozen, rows, batch_size, bucket=16)
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert (found.tokens, found.n) == (tokens, len(lengths))


def test_no_examples():
    model = tiny.model()
    with pytest.raises(ValueError, match="found no examples, expected at least one"):
        mean_loss(model, *tiny.trees(model), TokenizedExamples((), np.zeros(0, np.int32)))
