"""Many adapters trained at once: one training step over lanes that share one backbone.

On an accelerator the lanes are a batch, `jax.vmap`; on a CPU they take turns within the step, since small products take
longer there in a batch than one after the other. A lane is what differs between runs of one setting: seed, batches,
adapter. Every lane computes what `align` or `attack` computes for its seed (tests/experiment/test_lanes.py compares
them).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine import data, optim, training
from jaxvaccine.attacks import all_weights, refusal_ablation
from jaxvaccine.defenses import Defense
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.attack import estimator
from jaxvaccine.experiment.methods import AlignmentMethod, TuningMethod
from jaxvaccine.experiment.objectives import Objective, Plain
from jaxvaccine.experiment.parts import ComputationPart, TrainingPart
from jaxvaccine.llama import Llama, init_adapter
from jaxvaccine.llama_config import LoraConfig
from jaxvaccine.merging import Update, freeze_adapter, merge_adapter
from jaxvaccine.quantisation import is_quantised

Tree = Any
# 0 where every lane has its own, None where all share one; or a function that gives a tree of both.
Axes = int | None | Callable[[Tree], Tree]
Method = AlignmentMethod | TuningMethod
# So small models are trained for so long that a longer program pays.
MOST_LAYERS_A_TURN = 8


class Lanes(NamedTuple):
    """Adapters [N, L, ...] and the backbone that they belong to; or, of a model without LoRA sites, all weights of each
    lane, as of `all_weights.to_train`, and nothing beside them."""

    model: Llama
    adapters: Tree
    frozen: Tree  # leaves [L, ...], or [N, L, ...] where `own_base`
    own_base: bool = False  # every lane has frozen weights of its own, or updates, as of `base_axes`

    @property
    def count(self) -> int:
        return jax.tree.leaves(self.adapters)[0].shape[0]

    def trained(self, i: int) -> tuple[Tree, Tree]:
        """(what trains, what is frozen beside it) of one lane."""
        axes = _axes_of_own(self.frozen) if self.own_base else None
        return take(self.adapters, i), by_axis(lambda axis, of: of if axis is None else take(of, i), axes, self.frozen)

    def lane(self, i: int) -> tuple[Tree, Tree]:
        """(adapter, frozen) of one lane; (None, its weights) where all of them train."""
        trained, frozen = self.trained(i)
        return (None, all_weights.to_model(self.model, trained)) if self.model.lora is None else (trained, frozen)


def stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(tree: Tree, i: int) -> Tree:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def by_axis(function: Callable, axes: Tree, *trees: Tree) -> Tree:
    """`function(axis, *parts)` of every part of the trees that has one axis, 0 or None."""
    return jax.tree.map(function, axes, *trees, is_leaf=lambda axis: axis is None)


def lane_axes(state: training.TrainState, defense: Defense) -> training.TrainState:
    """Over which axis of which leaf lanes go: 0, and None for the numbers that count steps.

    Those are common to all lanes, so that what T-Vaccine does every J or K steps stays a branch; under vmap a branch on
    a batched number computes both sides in every step.
    """
    of_defense = jax.tree.map(lambda _: 0, state.defense)
    if defense.counters:
        of_defense = of_defense._replace(**dict.fromkeys(defense.counters))
    return jax.tree.map(lambda _: 0, state)._replace(step=None, defense=of_defense)


def base_axes(own_base: bool) -> Axes:
    """Over which axis of frozen weights lanes go, for `over_lanes`."""
    return _axes_of_own if own_base else None


def _axes_of_own(frozen: Tree) -> Tree:
    """A quantised base is shared, and only the updates beside it are a lane's own, in the place of merged weights."""
    if not is_quantised(frozen):
        return 0
    return jax.tree.map(lambda leaf: 0 if isinstance(leaf, Update) else None, frozen,
                        is_leaf=lambda leaf: isinstance(leaf, Update))


def take_turns() -> bool:
    """Whether lanes are computed one after the other."""
    return jax.default_backend() == "cpu"


def over_lanes(function: Callable, in_axes: tuple[Axes, ...], turns: bool | None = None) -> Callable:
    """`jax.vmap(function, in_axes)`, computed one lane after the other where lanes take turns.

    in_axes: of each argument. turns: whether they do; by default as `take_turns` says.
    """
    def call(*arguments):
        axes = tuple(of(argument) if callable(of) else of for of, argument in zip(in_axes, arguments, strict=True))
        if not (take_turns() if turns is None else turns):
            return jax.vmap(function, axes)(*arguments)
        own = by_axis(lambda axis, of: None if axis is None else of, axes, arguments)
        return jax.lax.map(lambda own: function(*by_axis(
            lambda axis, mine, of_all: of_all if axis is None else mine, axes, own, arguments)), own)

    return call


@functools.lru_cache(maxsize=32)
def compiled(model: Llama, method: Method, optimizer: optim.Kind, steps: int, own_base: bool,
             turns: bool | None = None, objective: Objective = Plain()):
    """(init, step) over lanes: init(adapters, fishers=None) -> state, step(state, frozen, batches, keys, scalars,
    layers=None) -> (state, metrics). An attack is of the layers that the step's last argument names, [N, L] bool. The
    optimizer's numbers are of one step. fishers: of every lane, where something takes Fisher weights, which are then in
    the state.

    steps: of a run of the method, which counts where the method reads it (`steps_read`). turns: as of `over_lanes`.
    """
    def defense(layers, fisher=None) -> Defense:
        if isinstance(method, AlignmentMethod):
            return method.make(model)
        return estimator(objective, method, model, steps, fisher, layers)

    def init(adapter, fisher=None):
        # Its numbers are no part of an optimizer's state.
        return training.init_train_state(adapter, defense(None, fisher),
                                         optim.layer_masked_step(optimizer, optim.Scalars(0.0)))

    trained = (all_weights.shapes(model) if model.lora is None else
               jax.eval_shape(lambda: init_adapter(model, jax.random.key(0))))
    axes = lane_axes(jax.eval_shape(init, trained), defense(None))

    def step_of_lane(own, shared, frozen, batches, key, scalars, layers):
        state = by_axis(lambda axis, mine, of_all: of_all if axis is None else mine, axes, own, shared)
        # Numbers and layers are traced, so that other ones compile nothing anew.
        return training.make_train_step(defense(layers), optim.layer_masked_step(optimizer, scalars))(
            state, frozen, batches, key)

    def step(state, frozen, batches, keys, scalars, layers=None):
        own = by_axis(lambda axis, leaf: None if axis is None else leaf, axes, state)
        shared = by_axis(lambda axis, leaf: leaf if axis is None else None, axes, state)
        state, metrics = over_lanes(step_of_lane, (0, None, base_axes(own_base), 0, 0, None, 0), turns)(
            own, shared, frozen, batches, keys, scalars, layers)
        return by_axis(lambda axis, leaf: leaf[0] if axis is None else leaf, axes, state), metrics

    return jax.jit(jax.vmap(init, out_axes=axes)), jax.jit(step, donate_argnums=0)


def steps_read(method: Method, steps: int) -> int:
    """`steps` of `compiled`: of a run of so many, those that the method reads; else 1, so that runs of any length share
    a compiled step."""
    return steps if isinstance(method, TuningMethod) and method.reads_steps else 1


def train(lanes: Lanes, method: Method, part: TrainingPart, bucket: int, sources: Sequence[stage.Sources],
          seeds: Sequence[int], layers: np.ndarray | None = None, observe: Callable[[int, Lanes], None] | None = None,
          progress: bool = False, description: str = "", objective: Objective = Plain(), fishers: Tree | None = None
          ) -> tuple[Lanes, dict[str, np.ndarray]]:
    """Trains all lanes; lane i sees sources[i] in the order of seeds[i].

    Args:
      lanes: where training starts.
      method: of the alignment or, in an attack, the provider's.
      part: optimizer, batch size and length.
      bucket: multiple, in tokens, to which batches are padded.
      sources: of `data.training_batches`, of the same sizes in every lane.
      seeds: of each lane.
      layers: [L] bool, where an attack trains, or [N, L] of each lane; None for all.
      observe: called with the number of steps done, from 0 on, and the lanes as they are then.
      progress: shows a bar, with `description`, of the steps.
      objective: of an attack.
      fishers: adapters' Fisher weights, [N, L, ...], where the method or the objective takes them.

    Returns:
      The trained lanes, and every metric of every step, [steps, N, ...].

    Raises:
      ValueError: Fisher weights are missing.
      FloatingPointError: the loss of a lane is not finite.
    """
    from tqdm import tqdm

    if fishers is None and (objective.takes_fisher or getattr(method, "takes_fisher", False)):
        raise ValueError(f"fishers: found none, expected Fisher weights of every lane, which {method} with {objective} "
                         "takes")
    steps = stage.count_steps(part, sources[0])
    optimizer = part.optimizer()
    init, step_fn = compiled(lanes.model, method, optimizer.kind, steps_read(method, steps), lanes.own_base,
                             objective=objective)
    scalars = optim.scalars(optimizer, steps)
    lengths = data.batch_lengths(sources, seeds, bucket, steps)
    streams = [data.training_batches(of, seed, bucket, lengths) for of, seed in zip(sources, seeds, strict=True)]
    keys = jnp.stack([stage.training_key(seed) for seed in seeds])
    if layers is not None:
        layers = np.broadcast_to(layers, (lanes.count, lanes.model.config.num_layers))
    state, log = init(lanes.adapters, fishers), []
    for step in tqdm(range(steps), desc=description, unit="step", disable=not progress, dynamic_ncols=True):
        if observe is not None:
            observe(step, lanes._replace(adapters=state.adapter))
        batches = [stream(step) for stream in streams]
        state, metrics = step_fn(
            state, lanes.frozen, jax.tree.map(lambda *b: np.stack(b), *batches), keys,
            scalars._replace(learning_rate=scalars.learning_rate[step]), layers)
        log.append(metrics)
    lanes = lanes._replace(adapters=state.adapter)
    metrics = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(log))
    if not np.isfinite(metrics["loss"]).all():
        raise FloatingPointError(f"loss: found values that are not finite with {method}, expected finite numbers")
    if observe is not None:
        observe(steps, lanes)
    return lanes, metrics


def fresh(base: stage.Base, lora: LoraConfig, part: ComputationPart, seeds: Sequence[int]) -> Lanes:
    """Lanes with new adapters, as `align` makes them for these seeds."""
    model = part.on(base.model.clone(lora=lora))
    if not take_turns() and jax.__version_info__ < (0, 12):
        model = model.clone(attention="xla")  # cuDNN's has no backward pass under vmap there
    if model.remat == "none" and model.config.num_layers <= MOST_LAYERS_A_TURN:
        model = model.clone(layers_a_turn=model.config.num_layers)
    return Lanes(model, new_adapters(model, seeds), base.frozen)


def merged(lanes: Lanes, lora: LoraConfig, seeds: Sequence[int]) -> Lanes:
    """Lanes with new adapters on weights into which the old ones are merged, as an attack's new adapter; beside
    quantised weights the old ones are frozen."""
    if is_quantised(lanes.frozen):
        frozen = freeze_adapter(lanes.model, lanes.adapters, lanes.frozen)
    else:
        frozen = jax.vmap(functools.partial(merge_adapter, lanes.model), in_axes=(0, 0 if lanes.own_base else None))(
            lanes.adapters, lanes.frozen)
    model = lanes.model.clone(lora=lora)
    return Lanes(model, new_adapters(model, seeds), frozen, own_base=True)


def whole(lanes: Lanes) -> Lanes:
    """Lanes whose weights, with their adapters merged, are each lane's own and train."""
    if lanes.model.lora is None:
        return lanes

    def weights(adapter, frozen):
        return all_weights.to_train(merge_adapter(lanes.model, adapter, frozen))

    return Lanes(lanes.model.clone(lora=None), jax.jit(jax.vmap(weights, (0, 0 if lanes.own_base else None)))(
        lanes.adapters, lanes.frozen), {})


def ablated(lanes: Lanes, directions: Tree) -> Lanes:
    """Lanes of `whole`, each with its own direction [N, D] projected out."""
    def weights(weights, r):
        return all_weights.to_train(refusal_ablation.ablate(
            lanes.model, all_weights.to_model(lanes.model, weights), r))

    return Lanes(refusal_ablation.untied(lanes.model), jax.jit(jax.vmap(weights))(lanes.adapters, directions), {})


def adapted(lanes: Lanes, lora: LoraConfig, seeds: Sequence[int]) -> Lanes:
    """Lanes of `whole` with new adapters in the place of weights that train."""
    model = lanes.model.clone(lora=lora)
    return Lanes(model, new_adapters(model, seeds), jax.vmap(functools.partial(all_weights.to_model, lanes.model))(
        lanes.adapters), own_base=True)


def new_adapters(model: Llama, seeds: Sequence[int]) -> Tree:
    return stack([init_adapter(model, stage.fresh_key(seed)) for seed in seeds])
