"""Full-parameter fine-tuning: all weights of a model train, where elsewhere an adapter does.

Whatever trains adapters (`training`, `optim.layer_masked`, defenses) takes a tree whose leaves are stacked by layer on
axis 0. What a model has once, its embedding, last norm and output head, is such a leaf of one layer: an optimizer that
maps over axis 0 then sees every matrix whole, and no two of them together.

What trains is at least float32, whatever the model's dtype, and is cast to it for the computation: a step of AdamW
moves a weight by about the learning rate, and of bfloat16's 8 bits nearly all such steps would be rounded away.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxvaccine import llama, losses
from jaxvaccine.conventions import IGNORED, at_least_float32
from jaxvaccine.defenses.base import Defense, LossFn, mask_layers
from jaxvaccine.microbatches import means_in_microbatches, supervised_count

Tree = Any
LAYERS = "layers"  # of a model's weights, those that are stacked already
HEAD = ("embed_tokens", "lm_head")  # what logits are computed with


def stacked(frozen: Tree) -> Tree:
    """Weights with layers on axis 0 of every leaf: those [L, ...] as they are, the others [1, ...]."""
    return {name: child if name == LAYERS else jax.tree.map(lambda x: x[None], child)
            for name, child in frozen.items()}


def unstacked(weights: Tree) -> Tree:
    """The inverse of `stacked`."""
    return {name: child if name == LAYERS else jax.tree.map(lambda x: x[0], child) for name, child in weights.items()}


def to_train(frozen: Tree) -> Tree:
    """What trains, of a model's weights: `stacked`, in at least float32."""
    return jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), stacked(frozen))


def to_model(model: llama.Llama, weights: Tree) -> Tree:
    """The model's weights in its dtype, as it computes with them, of what trains."""
    return jax.tree.map(lambda x: x.astype(model.dtype), unstacked(weights))


def shapes(model: llama.Llama) -> Tree:
    """ShapeDtypeStructs of what trains. Allocates nothing."""
    return jax.eval_shape(to_train, llama.tree_shapes(model)["params"])


def causal_lm_loss(model: llama.Llama) -> LossFn:
    """`losses.causal_lm_loss` as a function of all weights: `loss_fn(weights, {}, batch, …)`, weights of `to_train`.

    Nothing is frozen, and there is no LoRA dropout.
    """
    def loss_fn(weights, frozen, batch, perturbations=None, key=None):
        del frozen
        bare = model.clone(lora=None)
        return losses.causal_lm_loss(bare)(None, to_model(bare, weights), batch, perturbations, key)

    return loss_fn


def _block_kl(logits_fn, heads, hidden, targets):
    """`losses.block_kl` of two models, each with a head of its own."""
    hidden, reference = jnp.split(hidden, 2, axis=-1)
    log_p = jax.nn.log_softmax(logits_fn(heads[0], hidden))
    log_r = jax.nn.log_softmax(logits_fn(*jax.lax.stop_gradient((heads[1], reference))))
    return jnp.where(targets != IGNORED, optax.losses.kl_divergence_with_log_targets(log_p, log_r), 0).sum()


def loss_and_kl(model: llama.Llama, *, block: int = 128) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`losses.loss_and_kl` as a function of all weights; reference are weights like them, held constant."""
    def means_fn(weights, frozen, batch, reference, key=None):
        del frozen, key
        bare = model.clone(lora=None)
        logits_fn = functools.partial(llama.token_logits, bare)
        own, other = to_model(bare, weights), jax.lax.stop_gradient(to_model(bare, reference))
        heads = tuple({name: of[name] for name in HEAD if name in of} for of in (own, other))
        hidden = [llama.hidden_states(bare, None, of, batch["input_ids"], batch["attention_mask"])
                  for of in (own, other)]
        targets, _ = losses.supervised_targets(batch["labels"])
        return (losses.mean_over_targets(losses.block_cross_entropy, logits_fn, heads[0], hidden[0], targets, block),
                losses.mean_over_targets(_block_kl, logits_fn, heads, jnp.concatenate(hidden, axis=-1), targets, block))

    def loss_fn(weights, frozen, batch, reference, key=None):
        return means_in_microbatches(means_fn, lambda part: (supervised_count(part),) * 2, model.microbatch_size,
                                     weights, frozen, batch, reference, key)

    return loss_fn


def only_layers(defense: Defense, layers) -> Defense:
    """The defense, over all weights, with those of other layers frozen, and with them embedding, last norm and head.

    Args:
      defense: one that freezes nothing itself.
      layers: [L] bool, true where a layer trains; may be traced.
    """
    def masks(weights):
        return {name: jnp.asarray(layers) if name == LAYERS else jnp.zeros(1, bool) for name in weights}

    def gradient(weights, frozen, state, batches, key):
        grads, state, metrics = defense.gradient(weights, frozen, state, batches, key)
        return mask_layers(masks(weights), grads), state, metrics

    return defense._replace(gradient=gradient, trainable=lambda state, weights: masks(weights))
