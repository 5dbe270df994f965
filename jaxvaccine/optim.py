"""The papers' optimizer, clipped AdamW under a schedule, and others; with layers that freeze and come back.

Optimizers, schedules and the masking of one layer are Optax's; ours is the way over all layers of all leaves, and one
line of PyTorch's clipping.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule = Literal["constant", "linear", "cosine"]
Kind = Literal["adamw", "sgd", "momentum", "adafactor", "muon", "normalised_sgd"]
# Of a normalised step's norm, as of the step that Booster simulates.
NORM_EPSILON = 1e-7


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as the authors run it: β (0.9, 0.999), ε 1e-8, decoupled weight decay on every adapter matrix; or another.

    Attributes:
      learning_rate: its peak.
      schedule: after the warm-up, constant, or a line or half a cosine down to 0 at the last step.
      warmup_ratio: part of all steps, rounded up, over which the rate rises from 0 (at the first step) to its peak.
      weight_decay: the share lr · weight_decay of a weight is taken off at each step.
      clip_norm: largest global norm of a gradient; 0 turns clipping off.
      kind: what becomes of a gradient g before it is multiplied by the learning rate, of each layer of a leaf by
        itself: "sgd" g; "momentum" m ← 0.9 m + g, as `torch.optim.SGD`; "adafactor" and "muon" as of
        `scale_by_adafactor` and `scale_by_muon_or_adam`; "normalised_sgd" g / (‖g‖ + 1e-7), one norm over all that
        trains and no clipping: the step that Booster simulates. The decay is decoupled of all.
    """

    learning_rate: float = 5e-4
    schedule: Schedule = "constant"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    kind: Kind = "adamw"

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"OptimizerConfig.kind: found {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
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


class Scalars(NamedTuple):
    """Numbers of a step, any of which may be traced: others compile nothing anew.

    Attributes:
      learning_rate: of this step; in `scalars` [steps], of every step of a run.
      weight_decay: as of `OptimizerConfig`; None in the place of 0, which is another program.
      clip_norm: the same.
    """

    learning_rate: optax.ScalarOrSchedule
    weight_decay: float | jax.Array | None = None
    clip_norm: float | jax.Array | None = None


def scalars(config: OptimizerConfig, steps: int) -> Scalars:
    """The numbers of a run of so many steps, on the host: learning rates [steps] float, of JAX's default width."""
    # One program for each rate, as a step that holds the schedule would have it.
    rate = jax.jit(learning_rate_schedule(config, steps))
    return Scalars(np.array([rate(step) for step in range(steps)], jnp.result_type(float)),
                   *_constants(config))


def _constants(config: OptimizerConfig) -> tuple[float | None, float | None]:
    return config.weight_decay or None, config.clip_norm or None


def clip_by_global_norm(max_norm: float | jax.Array) -> optax.GradientTransformation:
    """g · min(1, max_norm / (‖g‖ + 1e-6)), as `torch.nn.utils.clip_grad_norm_` (Optax's has no 1e-6)."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (factor * g).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def normalise() -> optax.GradientTransformation:
    """g / (‖g‖ + 1e-7), one norm over all leaves."""

    def update(updates, state, params=None):
        del params
        factor = 1 / (optax.tree.norm(updates) + NORM_EPSILON)
        return jax.tree.map(lambda g: (factor * g).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor without momentum (Shazeer & Stern, arXiv 1804.04235, algorithms 4 and 5), of Optax's parts.

    Every matrix is factored, however small, as `torch.optim.Adafactor` has it: beside it the moments of its rows and
    columns are kept, decaying by 1 − t^−0.8; the update is clipped to a root mean square of 1, and multiplied by that
    of the matrix, at least 1e-3. The squares' floor is the paper's 1e-30. PyTorch has another floor, and lets no
    learning rate be above 1/√t.
    """
    return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0),
                       optax.scale_by_param_block_rms(1e-3))


def scale_by_muon_or_adam() -> optax.GradientTransformation:
    """Muon of a matrix [in, out] (Jordan 2024), Adam of anything else, as `optax.contrib.muon`.

    Nesterov momentum of 0.95 with Adam's corrections of the bias, five Newton-Schulz steps, and the factor
    √max(1, out / in). The definition is Optax's: `torch.optim.Muon` corrects no bias, and computes in bfloat16.
    """
    muon = optax.chain(optax.contrib.scale_by_muon(), optax.stateless(
        lambda updates, params: updates * math.sqrt(max(1, updates.shape[1] / updates.shape[0]))))
    adam = optax.scale_by_adam()

    def of(leaf: jax.Array) -> optax.GradientTransformation:
        return muon if leaf.ndim == 2 else adam

    return optax.GradientTransformation(
        lambda params: of(params).init(params),
        lambda updates, state, params=None: of(updates).update(updates, state, params))


def scale_by_kind(kind: Kind) -> optax.GradientTransformation:
    """What an optimizer makes of the gradient of one layer of one leaf, as of `OptimizerConfig`."""
    match kind:
        case "adamw":
            return optax.scale_by_adam()
        case "momentum":
            return optax.trace(0.9)
        case "adafactor":
            return scale_by_adafactor()
        case "muon":
            return scale_by_muon_or_adam()
        case _:
            return optax.identity()


def layer_masked(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` on every layer of every leaf by itself, each with its own state; what is frozen does not move at all.

    All leaves are stacked on axis 0 by layer; the state is their tree with a state of `inner`, stacked in the same way,
    in the place of each. `inner` sees one layer of one leaf, an array without the layer axis, as if it were all that
    there is: Adafactor's rows and columns and Muon's matrix are that layer's. A norm over several, as for clipping,
    goes outside.

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


def layer_masked_step(kind: Kind, of: Scalars) -> optax.GradientTransformationExtraArgs:
    """An optimizer with a state per layer of every leaf.

    First comes what takes a norm over all leaves: the gradients of what is frozen are to be zero, as
    `training.make_train_step` gives them.

    Args:
      kind: as of `OptimizerConfig`.
      of: its numbers, the learning rate a number or a schedule over the global steps.

    Returns:
      An Optax transformation over layer-stacked trees, whose `update` takes `trainable` as `layer_masked`'s.
    """
    clip = optax.identity() if of.clip_norm is None else clip_by_global_norm(of.clip_norm)
    decay = optax.add_decayed_weights(0.0 if of.weight_decay is None else of.weight_decay)
    return optax.chain(
        normalise() if kind == "normalised_sgd" else clip,
        # The decay is inside the mask: a frozen layer's weights don't shrink either.
        layer_masked(optax.chain(scale_by_kind(kind), decay)),
        optax.scale_by_learning_rate(of.learning_rate),
    )


def layer_masked_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """`layer_masked_step` under the config's schedule.

    Args:
      config: kind and hyper-parameters.
      steps: length of the whole run, over which the schedule extends.
    """
    return layer_masked_step(config.kind, Scalars(learning_rate_schedule(config, steps), *_constants(config)))


def layer_masked_adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """`layer_masked_optimizer` of AdamW, the papers'.

    Raises:
      ValueError: the config is of another optimizer.
    """
    if config.kind != "adamw":
        raise ValueError(f"layer_masked_adamw: kind: found {config.kind!r}, expected adamw: layer_masked_optimizer has "
                         "the others")
    return layer_masked_optimizer(config, steps)
