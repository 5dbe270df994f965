"""Losses of a causal language model that compute logits only where labels are supervised."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvaccine import llama
from jaxvaccine.conventions import IGNORED
from jaxvaccine.microbatches import in_microbatches, means_in_microbatches, supervised_count

Batch = Mapping[str, Any]
LossFn = Callable[..., tuple[jax.Array, dict[str, Any]]]


def supervised_targets(labels_BxT) -> tuple[jax.Array, jax.Array]:
    """Target of every position [B, T] (position i predicts label i + 1, the last nothing) and where there is one."""
    targets_BxT = jnp.pad(labels_BxT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    return targets_BxT, targets_BxT != IGNORED


def sum_over_targets(block_sum: Callable, logits_fn: Callable, frozen, hidden_NxD, targets_N, block: int):
    """Σ over the positions whose target is not IGNORED, in blocks of `block` positions.

    Supervised positions are gathered to the front, and a block without any is skipped at run time: the work is that of
    the supervised positions rounded up to a block, the memory that of one block's logits [block, V], and no shape
    depends on how many there are, so that nothing recompiles.

    Args:
      block_sum: one of the `block_…` below: (logits_fn, frozen, hidden [block, D], targets [block]) -> scalar. The last
        block is filled up with positions whose target is IGNORED.
      logits_fn: (frozen, hidden [block, D]) -> [block, V].
    """
    count = targets_N.shape[0]
    block = min(block, count)
    blocks = -(-count // block)
    # `fill_value` points one past the end: gathers there return the fill, and their gradients are dropped.
    order = jnp.nonzero(targets_N != IGNORED, size=blocks * block, fill_value=count)[0]
    hidden = hidden_NxD.at[order].get(mode="fill", fill_value=0).reshape(blocks, block, -1)
    targets = targets_N.at[order].get(mode="fill", fill_value=IGNORED).reshape(blocks, block)
    return _sum_over_blocks(functools.partial(block_sum, logits_fn), frozen, hidden, targets)


def block_cross_entropy(logits_fn, frozen, hidden, targets):
    """Σ −log p(target)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_fn(frozen, hidden), jnp.maximum(targets, 0))
    # Not by its `where`, whose gradient is NaN in a row that counts nowhere.
    return jnp.where(targets != IGNORED, losses, 0).sum()


def block_negative_entropy(logits_fn, frozen, hidden, targets):
    """Σ Σ_v p_v log p_v, of the distributions over the vocabulary where there is a target."""
    log_p = jax.nn.log_softmax(logits_fn(frozen, hidden))
    return jnp.where(targets != IGNORED, jnp.sum(jnp.exp(log_p) * log_p, axis=-1), 0).sum()


def block_kl(logits_fn, frozen, hidden, targets):
    """Σ KL(reference ‖ p) of hidden states [block, 2 D]: p's, then the reference's, which is held constant."""
    hidden, reference = jnp.split(hidden, 2, axis=-1)
    log_p, log_r = (jax.nn.log_softmax(logits_fn(frozen, x)) for x in (hidden, jax.lax.stop_gradient(reference)))
    return jnp.where(targets != IGNORED, optax.losses.kl_divergence_with_log_targets(log_p, log_r), 0).sum()


def _skip_empty(fn, frozen, blocks):
    """Maps `fn(frozen, hidden, targets)` over the blocks; where the first target is IGNORED the result is zeros."""
    # Around the cond, and not in it: what a branch keeps for its derivative is otherwise stacked over all blocks, the
    # logits and, worse, the output head itself.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(args):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, frozen, *args))
        return jax.lax.cond(args[1][0] != IGNORED, fn, lambda *_: zeros, frozen, *args)

    return jax.lax.map(one, blocks)


# The gradient with respect to the hidden states is computed in the forward pass, while a block's logits are at hand:
# they are neither kept for the backward pass nor computed twice. That of the output head costs as much again and is
# computed only if somebody differentiates with respect to the frozen weights.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_blocks(block_loss, frozen, hidden, targets):
    return _skip_empty(block_loss, frozen, (hidden, targets)).sum()


def _sum_over_blocks_fwd(block_loss, frozen, hidden, targets):
    train_frozen = any(leaf.perturbed for leaf in jax.tree.leaves(frozen))
    frozen, blocks = jax.tree.map(lambda leaf: leaf.value, (frozen, (hidden, targets)))
    losses, hidden_grads = _skip_empty(jax.value_and_grad(block_loss, argnums=1), frozen, blocks)
    frozen_grads = None
    if train_frozen:
        frozen_grads = jax.grad(lambda frozen: _skip_empty(block_loss, frozen, blocks).sum())(frozen)
    return losses.sum(), (hidden_grads, frozen_grads)


def _sum_over_blocks_bwd(block_loss, residuals, cotangent):
    def scale(tree):
        return jax.tree.map(lambda grad: (cotangent * grad).astype(grad.dtype), tree)

    hidden_grads, frozen_grads = residuals
    return scale(frozen_grads), scale(hidden_grads), None


_sum_over_blocks.defvjp(_sum_over_blocks_fwd, _sum_over_blocks_bwd, symbolic_zeros=True)


def mean_over_targets(block_sum: Callable, logits_fn: Callable, frozen, hidden_BxTxD, targets_BxT, block: int):
    """`sum_over_targets` divided by the number of targets; 0 without any."""
    total = sum_over_targets(block_sum, logits_fn, frozen, hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1]),
                             targets_BxT.reshape(-1), block)
    return total / jnp.maximum((targets_BxT != IGNORED).sum(), 1)


def _mean_over_supervised(model: llama.Llama, block_sum: Callable, block: int, adapter, frozen, batch: Batch,
                          perturbations=None, key=None):
    """The mean of one of the `block_…` over the supervised positions of a batch."""
    hidden_BxTxD = llama.hidden_states(
        model, adapter, frozen, batch["input_ids"], batch["attention_mask"], perturbations=perturbations, key=key)
    targets_BxT, _ = supervised_targets(batch["labels"])
    return mean_over_targets(
        block_sum, functools.partial(llama.token_logits, model), frozen, hidden_BxTxD, targets_BxT, block)


def causal_lm_loss(model: llama.Llama, *, block: int = 128) -> LossFn:
    """The mean cross-entropy over the supervised positions of the whole batch.

    Args:
      model: the architecture.
      block: supervised positions whose logits are computed at a time; [block, V] is the largest array of logits.

    Returns:
      `loss_fn(adapter, frozen, batch, perturbations=None, key=None) -> (loss, aux)`. batch: "input_ids" [B, T] int32,
      "labels" [B, T] int32 (-100 = not supervised), "attention_mask" [B, T], right-padded. A row without supervised
      positions contributes nothing; a batch without any has loss 0 (`data.check_batch` refuses it beforehand). `key`
      draws LoRA dropout, None turns it off. aux: "tokens", how many positions were supervised; "perturbations", what
      was added at the perturbation sites, from which a defense learns their shapes; "slots", which says that it takes
      `Slots` and `SiteNorms` in their place.
    """
    mean_fn = functools.partial(_mean_over_supervised, model, block_cross_entropy, block)

    def loss_fn(adapter, frozen, batch: Batch, perturbations=None, key=None):
        no_perturbations = llama.zero_perturbations(model, *batch["input_ids"].shape)
        loss = in_microbatches(mean_fn, model.microbatch_size, adapter, frozen, batch, perturbations, key)
        return loss, {"tokens": supervised_count(batch),
                      "perturbations": no_perturbations if perturbations is None else perturbations, "slots": ()}

    return loss_fn


def negative_entropy(model: llama.Llama, *, block: int = 128) -> LossFn:
    """−H of the next-token distributions, the mean over the supervised positions of the whole batch.

    `negative_entropy(model)(adapter, frozen, batch, key=None) -> (−H, {})`, batch and key as of `causal_lm_loss`.
    """
    mean_fn = functools.partial(_mean_over_supervised, model, block_negative_entropy, block)

    def loss_fn(adapter, frozen, batch: Batch, key=None):
        return in_microbatches(mean_fn, model.microbatch_size, adapter, frozen, batch, None, key), {}

    return loss_fn


def loss_and_kl(model: llama.Llama, *, block: int = 128) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The cross-entropy, and KL(p_reference ‖ p) of the next-token distributions: means over the supervised positions.

    `loss_and_kl(model)(adapter, frozen, batch, reference, key=None) -> (loss, kl)`; reference is an adapter, held
    constant and without dropout; batch and key are as of `causal_lm_loss`.
    """
    logits_fn = functools.partial(llama.token_logits, model)

    def means_fn(adapter, frozen, batch: Batch, reference, key=None):
        inputs = batch["input_ids"], batch["attention_mask"]
        hidden_BxTxD = llama.hidden_states(model, adapter, frozen, *inputs, key=key)
        reference_BxTxD = jax.lax.stop_gradient(llama.hidden_states(model, reference, frozen, *inputs))
        targets_BxT, _ = supervised_targets(batch["labels"])
        both_BxTx2D = jnp.concatenate([hidden_BxTxD, reference_BxTxD], axis=-1)
        return (mean_over_targets(block_cross_entropy, logits_fn, frozen, hidden_BxTxD, targets_BxT, block),
                mean_over_targets(block_kl, logits_fn, frozen, both_BxTx2D, targets_BxT, block))

    def loss_fn(adapter, frozen, batch: Batch, reference, key=None):
        return means_in_microbatches(
            means_fn, lambda part: (supervised_count(part),) * 2, model.microbatch_size, adapter, frozen, batch,
            reference, key)

    return loss_fn
