"""Losses that read what a language model computes on the way, and not its predictions alone."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxvaccine import llama
from jaxvaccine.conventions import IGNORED, at_least_float32
from jaxvaccine.losses import Batch, block_cross_entropy, mean_over_targets, supervised_targets
from jaxvaccine.microbatches import means_in_microbatches, supervised_count

# RepNoise's kernels: exp(−‖x − y‖² / b), b the mean squared distance times these.
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def loss_and_hidden_distance(model: llama.Llama, *, block: int = 128) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The cross-entropy, and how far the hidden states are from those of another adapter: TAR's two retain losses.

    `loss_and_hidden_distance(model)(adapter, frozen, batch, reference, key=None) -> (loss, distance)`. distance is
    ‖h − h_reference‖₂, the mean over tokens (padding does not count) and over the L + 1 hidden states: the embeddings,
    what each further layer reads, and the final one, after the last norm. reference is an adapter, held constant and
    without dropout; batch and key are as of `causal_lm_loss`.
    """
    logits_fn = functools.partial(llama.token_logits, model)

    def distances(found, reference):
        dtype = at_least_float32(found.dtype)
        squared = jnp.sum((found.astype(dtype) - reference.astype(dtype)) ** 2, axis=-1)
        # The derivative at distance 0, where training starts, is 0 and not NaN.
        return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)

    def means_fn(adapter, frozen, batch: Batch, reference, key=None):
        inputs = batch["input_ids"], batch["attention_mask"]
        found = llama.layer_activations(model, adapter, frozen, *inputs, key=key)
        expected = jax.lax.stop_gradient(llama.layer_activations(model, reference, frozen, *inputs))
        by_token = distances(found.inputs, expected.inputs).sum(axis=0) + distances(found.final, expected.final)
        counts = batch["attention_mask"]
        states = model.config.num_layers + 1
        targets_BxT, _ = supervised_targets(batch["labels"])
        return (mean_over_targets(block_cross_entropy, logits_fn, frozen, found.final, targets_BxT, block),
                (by_token * counts).sum() / (states * jnp.maximum(counts.sum(), 1)))

    def counts_fn(batch: Batch):
        return supervised_count(batch), batch["attention_mask"].sum()

    def loss_fn(adapter, frozen, batch: Batch, reference, key=None):
        return means_in_microbatches(
            means_fn, counts_fn, model.microbatch_size, adapter, frozen, batch, reference, key)

    return loss_fn


def differing_tokens(harmful: Batch, harmless: Batch):
    """[B, T] bool: supervised tokens of the harmful rows that are not what the paired harmless rows have there."""
    same = (harmful["input_ids"] == harmless["input_ids"]) & harmless["attention_mask"].astype(bool)
    return (harmful["labels"] != IGNORED) & ~same


def squared_mmd(x_BxF, y_BxF):
    """Squared maximum mean discrepancy of two samples of the same size, by the sum of five Gaussian kernels.

    Biased: means over all pairs, those of a row with itself too. The kernels' bandwidths are BANDWIDTHS times the mean
    squared distance between different rows of both samples, held constant; 0 if all rows are equal.
    """
    rows = jnp.concatenate([x_BxF, y_BxF])
    norms = jnp.sum(rows * rows, axis=-1)
    # In full precision on GPUs too: these are differences of large numbers.
    products = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.maximum(norms[:, None] + norms[None] - 2 * products, 0)
    count = rows.shape[0]
    bandwidth = jax.lax.stop_gradient(squared.sum() / (count * (count - 1)))
    bandwidth = jnp.where(bandwidth > 0, bandwidth, 1)
    kernel = sum(jnp.exp(-squared / (bandwidth * factor)) for factor in BANDWIDTHS)
    sign = jnp.where(jnp.arange(count) < x_BxF.shape[0], 1, -1)
    return (sign[:, None] * sign * kernel).sum() / x_BxF.shape[0] ** 2


def layer_noise(key: jax.Array, layer, shape: tuple[int, ...], dtype):
    """The standard normal numbers that stand against one layer's activations."""
    return jax.random.normal(jax.random.fold_in(key, layer), shape, dtype)


def noise_and_ascent(model: llama.Llama, *, block: int = 128) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """RepNoise's two terms on harmful data, from one pass.

    `noise_and_ascent(model)(adapter, frozen, harmful, harmless, noise_key, key=None) -> (noise, ascent)`. Row i of the
    batch harmless is another answer to the prompt of row i of harmful; `differing_tokens` is what both terms see.

      noise: the mean over the layers of `squared_mmd` between the MLP's outputs and Gaussian noise, each a row's
        numbers in one, 0 where the mask is false.
      ascent: the mean cross-entropy of the harmful tokens, and of it the mean over the L + 1 hidden states, each read
        through the last norm (that of the final one, which is normed already, once) and the output head.

    A layer's noise, kernels and logits exist while it is their turn, and logits of `block` tokens at a time. Kernels
    compare every row with every other: the model's `microbatch_size` does not divide this pass.
    """
    def terms(adapter, frozen, harmful: Batch, harmless: Batch, noise_key, key=None):
        mask_BxT = differing_tokens(harmful, harmless)
        targets_BxT, _ = supervised_targets(jnp.where(mask_BxT, harmful["input_ids"], IGNORED))
        activations = llama.layer_activations(
            model, adapter, frozen, harmful["input_ids"], harmful["attention_mask"], key=key)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def discrepancy(layer, mlp_BxTxD):
            mlp_BxTxD = mlp_BxTxD.astype(at_least_float32(mlp_BxTxD.dtype))
            noise_BxTxD = layer_noise(noise_key, layer, mlp_BxTxD.shape, mlp_BxTxD.dtype)
            rows = [jnp.where(mask_BxT[..., None], x, 0).reshape(x.shape[0], -1) for x in (mlp_BxTxD, noise_BxTxD)]
            return squared_mmd(*rows)

        def loss(logits_fn, hidden_BxTxD):
            return mean_over_targets(block_cross_entropy, logits_fn, frozen, hidden_BxTxD, targets_BxT, block)

        def one(of):
            layer, mlp_BxTxD, input_BxTxD = of
            return discrepancy(layer, mlp_BxTxD), loss(functools.partial(llama.read_out, model), input_BxTxD)

        layers = model.config.num_layers
        by_layer, losses = jax.lax.map(one, (jnp.arange(layers), activations.mlp, activations.inputs))
        last = loss(functools.partial(llama.token_logits, model), activations.final)
        return by_layer.mean(), (losses.sum() + last) / (layers + 1)

    return terms
