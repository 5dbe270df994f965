"""Many adapters trained at once: the training step under `jax.vmap`, over lanes that share one base.

A lane is what differs between runs of one setting: seed, batches, adapter. Every lane computes what align.py or
finetune.py computes for its seed (tests/experiments/test_lanes.py compares them).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common
from experiments.align import AlignConfig, make_defense
from experiments.finetune import FinetuneConfig, fine_tuning
from jaxvaccine import data, defenses, optim, training
from jaxvaccine.data.batching import stream_seed
from jaxvaccine.llama import Llama, init_adapter, merge_adapter

Tree = Any
Sources = Mapping[str, tuple[data.TokenizedExamples, int]]


class Lanes(NamedTuple):
    """Adapters [N, L, ...] and the base that they belong to."""

    model: Llama  # with the adapters' LoRA sites
    adapters: Tree
    frozen: Tree  # leaves [L, ...], or [N, L, ...] if `own_base`
    own_base: bool = False  # every lane has a base of its own: the attack's, after merging

    @property
    def count(self) -> int:
        return jax.tree.leaves(self.adapters)[0].shape[0]

    def lane(self, i: int) -> tuple[Tree, Tree]:
        """(adapter, frozen) of one lane."""
        return take(self.adapters, i), take(self.frozen, i) if self.own_base else self.frozen


def stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(tree: Tree, i: int) -> Tree:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _lane_axes(defense: defenses.Defense, state: training.TrainState) -> training.TrainState:
    """0 for all leaves but the step's number and the defense's counters: those are common to all lanes, so that what
    T-Vaccine does every J or K steps stays a branch; under vmap a branch on a batched number computes both sides."""
    axes = jax.tree.map(lambda leaf: 0, state)
    of_defense = axes.defense._replace(**dict.fromkeys(defense.counters)) if defense.counters else axes.defense
    return axes._replace(step=None, defense=of_defense)


@functools.lru_cache(maxsize=32)
def _compiled(model: Llama, config: AlignConfig | None, optimizer_config: optim.OptimizerConfig, steps: int,
              own_base: bool):
    """(init, step) over lanes. config None is fine-tuning, of the layers that the step's last argument names."""
    optimizer = optim.layer_masked_adamw(optimizer_config, steps)

    def defense(layers):
        return fine_tuning(model, layers) if config is None else make_defense(config)(model)

    def init(adapter):
        return training.init_train_state(adapter, defense(None), optimizer)

    def step(state, frozen, batches, key, layers=None):
        # Traced, so that other layers compile nothing anew.
        return training.make_train_step(defense(layers), optimizer)(state, frozen, batches, key)

    state = jax.eval_shape(init, jax.eval_shape(lambda: init_adapter(model, jax.random.key(0))))
    axes = _lane_axes(defense(None), state)
    step = jax.vmap(step, in_axes=(axes, 0 if own_base else None, 0, 0, None), out_axes=(axes, 0))
    return jax.jit(jax.vmap(init, out_axes=axes)), jax.jit(step, donate_argnums=0)


def train(lanes: Lanes, config: common.TrainingConfig, sources: Sequence[Sources], seeds: Sequence[int],
          observe: Callable[[int, Lanes], None] | None = None) -> tuple[Lanes, dict[str, np.ndarray]]:
    """Trains all lanes; lane i sees sources[i] in the order of seeds[i].

    Args:
      lanes: where training starts.
      config: an `AlignConfig` trains with its defense, a `FinetuneConfig` its layers. Its own seed is not used.
      sources: of `data.training_batches`, of the same sizes in every lane.
      seeds: of each lane.
      observe: called with the number of steps done, from 0 on, and the lanes as they are then.

    Returns:
      The trained lanes, and every metric of every step, [steps, N, ...].

    Raises:
      ValueError: a defense of the fine-tuning stage, which lanes don't have.
      FloatingPointError: the loss of a lane is not finite.
    """
    if isinstance(config, FinetuneConfig):
        common.require(config, "defense", config.defense == "none", "none where many seeds are trained at once")
    steps = common.count_steps(config, sources[0])
    defense = _defense_alone(config) if isinstance(config, AlignConfig) else None
    layers = config.layer_mask(lanes.model.config.num_layers) if isinstance(config, FinetuneConfig) else None
    init, step_fn = _compiled(lanes.model, defense, config.optimizer(), steps, lanes.own_base)
    streams = [data.training_batches(of, seed, config.bucket) for of, seed in zip(sources, seeds, strict=True)]
    keys = jnp.stack([jax.random.key(stream_seed(seed, "training") % 2**32) for seed in seeds])
    state, log = init(lanes.adapters), []
    for step in range(steps):
        if observe is not None:
            observe(step, lanes._replace(adapters=state.adapter))
        batches = [stream(step) for stream in streams]
        state, metrics = step_fn(state, lanes.frozen, jax.tree.map(lambda *b: np.stack(b), *batches), keys,
                                 layers)
        log.append(metrics)
    lanes = lanes._replace(adapters=state.adapter)
    metrics = jax.tree.map(lambda *values: np.stack(values), *jax.device_get(log))
    if not np.isfinite(metrics["loss"]).all():
        raise FloatingPointError(f"loss: found values that are not finite in {config}, expected finite numbers")
    if observe is not None:
        observe(steps, lanes)
    return lanes, metrics


def _defense_alone(config: AlignConfig) -> AlignConfig:
    """The config without the flags of every training run, so that another length or seed compiles nothing anew."""
    every_run = {field.name: field.default for field in dataclasses.fields(common.TrainingConfig)}
    return dataclasses.replace(config, **every_run | {"run_dir": "-", "model": "-"})


def fresh(base: common.Base, config: Any, seeds: Sequence[int]) -> Lanes:
    """Lanes with new adapters, as align.py makes them for these seeds."""
    model = base.model.clone(lora=common.lora_of(config), remat=config.remat)
    return Lanes(model, _new_adapters(model, config, seeds), base.frozen)


def merged(lanes: Lanes, config: Any, seeds: Sequence[int]) -> Lanes:
    """Lanes with new adapters on weights into which the old ones are merged, as finetune.py's --adapter=new."""
    frozen = jax.vmap(functools.partial(merge_adapter, lanes.model), in_axes=(0, 0 if lanes.own_base else None))(
        lanes.adapters, lanes.frozen)
    model = lanes.model.clone(lora=common.lora_of(config))
    return Lanes(model, _new_adapters(model, config, seeds), frozen, own_base=True)


def _new_adapters(model: Llama, config: Any, seeds: Sequence[int]) -> Tree:
    return stack([init_adapter(model, common.fresh_key(dataclasses.replace(config, seed=seed))) for seed in seeds])
