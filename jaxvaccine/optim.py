"""The papers' optimizer: clipped AdamW under a schedule, with layers that freeze and come back.

AdamW, the schedules and the masking of one layer are Optax's; ours is the way over all layers of all leaves, and one
line of PyTorch's clipping.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

Schedule = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as the authors run it: β (0.9, 0.999), ε 1e-8, decoupled weight decay on every adapter matrix.

    Attributes:
      learning_rate: its peak.
      schedule: after the warm-up, constant, or a line or half a cosine down to 0 at the last step.
      warmup_ratio: part of all steps, rounded up, over which the rate rises from 0 (at the first step) to its peak.
      weight_decay: the share lr · weight_decay of a weight is taken off at each step.
      clip_norm: largest global norm of a gradient; 0 turns clipping off.
    """

    learning_rate: float = 5e-4
    schedule: Schedule = "constant"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"OptimizerConfig.schedule: found {self.schedule!r}, expected constant, linear or cosine")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"OptimizerConfig.warmup_ratio: found {self.warmup_ratio}, expected 0 to 1")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"OptimizerConfig.{name}: found {getattr(self, name)}, expected a finite number >= 0")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at global step 0, 1, …, steps − 1, equal to transformers' `get_scheduler` of the same name."""
    peak, warmup = config.learning_rate, math.ceil(steps * config.warmup_ratio)
    remaining = max(1, steps - warmup)  # as transformers: a run that is all warm-up divides by it too
    schedule = {
        # Without a warm-up Optax's stays at its first value.
        "constant": lambda: optax.warmup_constant_schedule(0.0 if warmup else peak, peak, warmup),
        "linear": lambda: optax.join_schedules(
            [optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, 0.0, remaining)], [warmup]),
        "cosine": lambda: optax.warmup_cosine_decay_schedule(0.0, peak, warmup, warmup + remaining),
    }[config.schedule]()
    # Optax divides an integer step in float32, in float64 mode too.
    return lambda step: schedule(jnp.asarray(step, jnp.result_type(float)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """g · min(1, max_norm / (‖g‖ + 1e-6)), as `torch.nn.utils.clip_grad_norm_` (Optax's has no 1e-6)."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (factor * g).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_masked(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` on every layer of every leaf by itself, each with its own state; what is frozen does not move at all.

    All leaves are stacked on axis 0 by layer; the state is their tree with a state of `inner`, stacked in the same way,
    in the place of each. `inner` must be elementwise: it never sees two leaves or two layers together, so a norm over
    all of them, as for clipping, goes outside.

    `update(..., trainable=masks)`: [L] bool for all leaves, a prefix of their tree with such masks as leaves, or None,
    by which nothing is frozen. Where a mask is false the update is zero and moments and step count stay; what comes
    back continues with its own count, as PyTorch's optimizers do for parameters without a gradient. Masks are traced.
    """
    masked = optax.conditionally_mask(inner, lambda step, trainable: trainable, forward_extra_args=True)

    def update_layer(trainable, updates, state, params):
        # Its own count, of calls, goes on in frozen layers and says nothing here: it is no part of our state.
        state = optax.ConditionallyMaskState(step=jnp.zeros((), jnp.int32), inner_state=state)
        updates, state = masked.update(updates, state, params, trainable=trainable)
        return updates, state.inner_state

    def update_leaf(mask, *of_leaf):
        return jax.vmap(inner.update)(*of_leaf) if mask is None else jax.vmap(update_layer)(mask, *of_leaf)

    def update(updates, state, params=None, *, trainable=None, **extra_args):
        del extra_args
        leaves, structure = jax.tree.flatten(updates)

        def per_leaf(tree):
            return [None] * len(leaves) if tree is None else structure.flatten_up_to(tree)

        masks = None if trainable is None else jax.tree.broadcast(trainable, updates)
        pairs = map(update_leaf, per_leaf(masks), leaves, per_leaf(state), per_leaf(params))
        new_updates, new_state = zip(*pairs, strict=True)
        return structure.unflatten(new_updates), structure.unflatten(new_state)

    return optax.GradientTransformationExtraArgs(lambda params: jax.tree.map(jax.vmap(inner.init), params), update)


def layer_masked_adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, AdamW with a state per layer of every leaf, schedule over the global steps.

    Args:
      config: hyper-parameters.
      steps: length of the whole run, over which the schedule extends.

    Returns:
      An Optax transformation over layer-stacked trees, whose `update` takes `trainable` as `layer_masked`'s.
    """
    clip = clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        # The decay is inside the mask: a frozen layer's weights don't shrink either.
        layer_masked(optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay))),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )
