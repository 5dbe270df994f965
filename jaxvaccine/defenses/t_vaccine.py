"""T-Vaccine: targeted, layer-wise Vaccine (arXiv 2410.09760)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.defenses.base import (
    Defense,
    LossFn,
    Tree,
    at_least_float32,
    check_positive,
    take_batch,
)
from jaxvaccine.defenses.vaccine import ActiveLayers, Direction, check_perturbation, perturbed_gradient, site_norms
from jaxvaccine.perturbations import taking_slots


class TVaccineState(NamedTuple):
    """Where the schedule stands."""

    step: jax.Array  # int32, gradients computed so far
    probabilities: jax.Array  # [L] at least float32, sum 1: how likely a layer is drawn first
    active_layers: jax.Array  # [L] bool, exactly S true (all of them before the first step)


def sample_layers(key: jax.Array, probabilities: jax.Array, count: int) -> jax.Array:
    """[L] bool, `count` of them true: drawn one by one without replacement, in proportion to [L] probabilities.

    Gumbel top-k on log p has the distribution of `numpy.random.choice(L, count, replace=False, p=p)` (Plackett-Luce;
    arXiv 1903.06059). Layers with p = 0 are drawn only when no others are left.
    """
    # A finite floor, so that layers with p = 0 come after all others and still in random order.
    scores = jnp.maximum(jnp.log(probabilities), -1e4) + jax.random.gumbel(key, probabilities.shape)
    return top_layers(scores, count)


def top_layers(scores: jax.Array, count: int) -> jax.Array:
    """[L] bool, true for the `count` largest of [L] numbers; of equal ones the lower layers are taken."""
    _, chosen = jax.lax.top_k(scores, count)
    return jnp.zeros(scores.shape, bool).at[chosen].set(True)


def layer_probabilities(loss_fn: LossFn, adapter, frozen, batch, key) -> jax.Array:
    """p_l = ‖∇_{a_l} h‖ / Σ_k ‖∇_{a_k} h‖ of the batch's loss h, [L]; uniform if all gradients vanish.

    loss_fn: of `taking_slots`.
    """
    norms = site_norms(loss_fn, adapter, frozen, batch, key)
    total = norms.sum()
    # A NaN stays one, so that the training loop finds it.
    return jnp.where(total == 0, 1 / norms.size, norms / jnp.where(total == 0, 1, total))


def released_masks(active_layers: jax.Array, in_mlp: Tree) -> Tree:
    """What the released program trains when [L] bool are active: the tree `in_mlp`, of bools, with [L] bool leaves.

    Attention adapters train in the active layers. MLP adapters are never frozen, but the re-entrant checkpointing of
    inactive layers passes no gradient to those below the first active layer f, so that they train in the layers from f
    on, active or not; in a model of more than 26 layers from f − 1 on.
    """
    total = active_layers.shape[0]
    first = jnp.argmax(active_layers) - (1 if total > 26 else 0)
    from_first = jnp.arange(total) >= first
    return jax.tree.map(lambda mlp: from_first if mlp else active_layers, in_mlp)


def t_vaccine(
    loss_fn: LossFn, rho: float = 3.0, layers: int = 8, sample_every: int = 20, probe_every: int = 200,
    freeze: Literal["layer", "released"] = "layer", importance: Literal["harmful", "alignment", "uniform"] = "harmful",
    draw: Literal["sample", "top"] = "sample", direction: Direction = "gradient",
    in_mlp: Callable[[Tree], Tree] | None = None,
) -> Defense:
    """Vaccine on S sampled layers: only they are perturbed, the norm is taken over them, and the others are frozen.

    Every K steps the probabilities are taken anew from one harmful batch, p_l = ‖∇_{a_l} h‖ / Σ_k ‖∇_{a_k} h‖; every J
    steps S layers are drawn without replacement in proportion to them; where both fall due, the probabilities come
    first. Both fall due at step 0. The schedule is traced: new active layers never recompile. Perturbations and their
    gradients are those of S layers, of the probe none is kept (`perturbations`).

    Args:
      loss_fn: a loss whose aux has "perturbations" (`base.LossFn`), leaves stacked [L, ...]. Unless it has "slots" too,
        perturbations take the memory of all layers, as Vaccine's.
      rho: norm of the whole perturbation.
      layers: S, how many layers are active.
      sample_every: J, in steps.
      probe_every: K, in steps.
      freeze: "layer" freezes the other layers whole, attention and MLP adapters, as the paper says; "released" what the
        authors' program does not train (`released_masks`), and needs in_mlp.
      importance: the batch whose gradient the probabilities are taken from; "alignment" and "uniform", 1 / L without a
        probe, are ablations.
      draw: "sample", or as an ablation "top", the S most probable layers.
      direction: as in `vaccine`.
      in_mlp: adapter -> which of its leaves are an MLP's, and not an attention's: bools, a tree like the adapter or a
        prefix of it, such as `llama.in_mlp`.

    Returns:
      A defense with state `TVaccineState`. It needs the batch "alignment", for the harmful importance also "harmful",
      and a key. Metrics: Vaccine's, and the state's probabilities and active_layers, [L] each.

    Raises:
      ValueError: an argument is out of range or missing; by init, if S is larger than the number of layers, or what
        in_mlp says does not fit the adapter.
    """
    check_positive("t_vaccine", layers=layers, sample_every=sample_every, probe_every=probe_every)
    check_perturbation("t_vaccine", rho, direction)
    for name, value, expected in (("freeze", freeze, ("layer", "released")),
                                  ("importance", importance, ("harmful", "alignment", "uniform")),
                                  ("draw", draw, ("sample", "top"))):
        if value not in expected:
            raise ValueError(f"t_vaccine: {name}: found {value!r}, expected one of {', '.join(expected)}")
    if freeze == "released" and in_mlp is None:
        raise ValueError("t_vaccine: in_mlp: found None, expected for freeze='released' a function that says which of "
                         "an adapter's leaves are an MLP's, such as llama.in_mlp")

    loss_fn = taking_slots(loss_fn)

    def trainable(state: TVaccineState, adapter) -> Tree:
        return state.active_layers if freeze == "layer" else released_masks(state.active_layers, in_mlp(adapter))

    def init(adapter) -> TVaccineState:
        leaf = jax.tree.leaves(adapter)[0]
        total, dtype = leaf.shape[0], at_least_float32(leaf.dtype)
        if layers > total:
            raise ValueError(f"t_vaccine: layers: found {layers}, expected at most the model's {total} layers")
        state = TVaccineState(
            jnp.zeros((), jnp.int32), jnp.full(total, 1 / total, dtype), jnp.ones(total, bool))
        jax.tree.broadcast(trainable(state, adapter), adapter)  # raises unless what in_mlp says fits the adapter
        return state

    def gradient(adapter, frozen, state: TVaccineState, batches, key):
        if key is None:
            raise ValueError("t_vaccine: key: found None, expected a PRNG key to draw layers with")
        batch = take_batch(batches, "alignment", "t_vaccine")
        probe_key, sample_key, key = jax.random.split(key, 3)
        probabilities = state.probabilities
        if importance != "uniform":  # the state starts with uniform probabilities
            probed = take_batch(batches, importance, "t_vaccine")
            probabilities = jax.lax.cond(
                state.step % probe_every == 0,
                lambda: layer_probabilities(loss_fn, adapter, frozen, probed, probe_key).astype(
                    state.probabilities.dtype),
                lambda: state.probabilities)
        active_layers = jax.lax.cond(
            state.step % sample_every == 0,
            lambda: (sample_layers(sample_key, probabilities, layers) if draw == "sample"
                     else top_layers(probabilities, layers)),
            lambda: state.active_layers)
        state = TVaccineState(state.step + 1, probabilities, active_layers)
        grads, metrics = perturbed_gradient(
            loss_fn, rho, direction, ActiveLayers(active_layers, layers), trainable(state, adapter), adapter, frozen,
            batch, key)
        return grads, state, metrics | {"probabilities": probabilities, "active_layers": active_layers}

    return Defense(init, gradient, trainable, counters=("step",))
