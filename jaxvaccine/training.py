"""The training loop: one jitted, donated step, and a loop that logs, checkpoints and resumes around it."""

import collections
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvaccine.data.batching import check_batch
from jaxvaccine.defenses.base import Defense, layers_of, mask_layers, select_layers

# How many steps may be under way while the metrics of an older one are read: enough to keep the device busy, few
# enough that an interrupt is answered soon.
IN_FLIGHT = 2


class TrainState(NamedTuple):
    """All that changes in training, and all that a checkpoint holds."""

    step: jax.Array  # int32, steps done
    adapter: Any  # LoRA tree, leaves [L, ...]
    optimizer: Any
    defense: Any


TrainStep = Callable[[TrainState, Any, Mapping[str, Any], jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def init_train_state(adapter, defense: Defense, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, in buffers of its own: the step donates them, and none may be given twice.

    Raises:
      ValueError: the defense has active layers in its state and does not say that they alone train, what it says does
        not fit the adapter, or its counters are no fields of its state.
    """
    state = defense.init(adapter)
    _check_trainable(defense.trainable(state, adapter), state, adapter)
    if missing := [name for name in defense.counters if name not in getattr(state, "_fields", ())]:
        raise ValueError(f"defense: counters: found {missing}, expected fields of its state, a NamedTuple")
    return jax.tree.map(jnp.copy, TrainState(jnp.zeros((), jnp.int32), adapter, optimizer.init(adapter), state))


def _check_trainable(masks, state, adapter) -> None:
    if masks is None:
        # A wrapper may have the state that it wraps anywhere in its own.
        keys = {getattr(key, "name", getattr(key, "key", None))
                for path, _ in jax.tree_util.tree_leaves_with_path(state) for key in path}
        if "active_layers" in keys:
            raise ValueError(
                "defense: found active_layers in its state and no trainable, expected it to say what trains: "
                "Defense(init, gradient, trainable=lambda state, adapter: state.active_layers); a wrapper passes it on")
        return
    try:
        of_leaves = jax.tree.leaves(jax.tree.broadcast(masks, adapter))
    except ValueError as e:
        raise ValueError(f"defense: trainable: found a tree that is no prefix of the adapter's ({e})") from e
    for mask, leaf in zip(of_leaves, jax.tree.leaves(adapter), strict=True):
        if (jnp.result_type(mask), jnp.shape(mask)) not in ((bool, leaf.shape[:1]), (bool, leaf.shape)):
            raise ValueError(f"defense: trainable: found {jnp.result_type(mask)}{list(jnp.shape(mask))}, expected "
                             f"bool{list(leaf.shape[:1])}, one for each layer, or bool{list(leaf.shape)}, one for each "
                             "weight")


def step_key(key: jax.Array, step) -> jax.Array:
    """The key of all that a step draws, from that of the run."""
    return jax.random.fold_in(key, step)


def make_train_step(defense: Defense, optimizer: optax.GradientTransformation) -> TrainStep:
    """`train_step(state, frozen, batches, key) -> (state, metrics)`, jitted; `state` is donated.

    What the defense does not train keeps its values bit for bit, whatever the optimizer; one that takes the extra
    argument `trainable`, as `optim.layer_masked`, is told which layers have anything that trains, and keeps the others'
    moments and counts too. The step's randomness is `step_key(key, state.step)`. Metrics are the defense's and
    gradient_norm, before clipping. Recompiles for new batch shapes only.

    Raises:
      ValueError: by the step, for frozen weights in float16, in which the gradients of a small loss are zero.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, frozen, batches, key):
        if any(jnp.result_type(leaf) == jnp.float16 for leaf in jax.tree.leaves(frozen)):
            raise ValueError("frozen: found float16 weights, expected bfloat16 or float32: the loss is not scaled, and "
                             "in float16 the gradients of a small one are zero")
        key = step_key(key, state.step)
        grads, defense_state, metrics = defense.gradient(state.adapter, frozen, state.defense, batches, key)
        trainable = defense.trainable(defense_state, state.adapter)
        grads = mask_layers(trainable, grads)
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, state.adapter, trainable=layers_of(trainable))
        adapter = select_layers(trainable, optax.apply_updates(state.adapter, updates), state.adapter)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, adapter, optimizer_state, defense_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def fit(
    train_step: TrainStep,
    state: TrainState,
    frozen,
    batches: Callable[[int], Mapping[str, Mapping[str, np.ndarray]]],
    *,
    steps: int,
    key: jax.Array,
    metrics_path: str | os.PathLike | None = None,
    save: Callable[[int, TrainState], None] | None = None,
    save_every: int = 0,
    vocab_size: int | None = None,
    progress: bool = True,
    description: str = "train",
) -> TrainState:
    """Trains from `state.step` to `steps`.

    Args:
      train_step: of `make_train_step`.
      state: where to start, consumed; a restored one resumes exactly, because batches and randomness depend on the step
        alone.
      frozen: base weights.
      batches: step number -> {name: batch} on the host.
      steps: number of the last step, exclusive.
      key: PRNG key of the whole run.
      metrics_path: JSONL, a line per step; lines of steps from state.step on, of an interrupted run, are replaced.
      save: called with (steps done, state) every `save_every` steps (0: never) and at the end. It must be done with the
        state's buffers when it returns.
      vocab_size: if given, token ids are checked against it; JAX would clamp those beyond it without a word.
      progress: whether to draw a bar with loss, tokens/s and the time left.
      description: the bar's name.

    Raises:
      ValueError: a batch that `check_batch` refuses, before its step.
      FloatingPointError: a metric of a step, such as its loss, is not finite; nothing is saved from then on.
    """
    from tqdm import tqdm

    first = int(state.step)
    log = MetricsLog(metrics_path, first) if metrics_path is not None else None
    pending: collections.deque = collections.deque()
    started, tokens_done = time.monotonic(), 0

    def settle(bar):
        nonlocal tokens_done
        step, metrics, tokens = pending.popleft()
        metrics = {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}
        tokens_done += tokens
        seconds = time.monotonic() - started
        if log is not None:
            log.write({"step": step, **metrics, "tokens": tokens, "seconds": round(seconds, 3)})
        bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {tokens_done / seconds:,.0f} tokens/s", refresh=False)
        bar.update()
        for name, value in metrics.items():
            if not np.isfinite(value).all():
                raise FloatingPointError(f"step {step}: {name}: found {value}, expected finite numbers")

    bar = tqdm(total=steps, initial=first, desc=description, unit="step", disable=not progress, dynamic_ncols=True)
    try:
        for step in range(first, steps):
            batch = batches(step)
            for name in batch:
                check_batch(batch[name], vocab_size)
            state, metrics = train_step(state, frozen, batch, key)
            pending.append((step, metrics, sum(int(b["attention_mask"].sum()) for b in batch.values())))
            saving = save is not None and ((save_every and (step + 1) % save_every == 0) or step + 1 == steps)
            # Before a state is saved, everything that led to it has been found finite.
            while len(pending) > (0 if saving else IN_FLIGHT):
                settle(bar)
            if saving:
                save(step + 1, state)
        while pending:
            settle(bar)
    finally:
        bar.close()
        if log is not None:
            log.close()
    return state


class MetricsLog:
    """Appends JSON objects, one a line; on opening, keeps the whole lines of steps before `first`, drops the others."""

    def __init__(self, path: str | os.PathLike, first: int):
        path = Path(path)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(entry, dict) and entry.get("step", first) < first:
                    kept.append(line + "\n")
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._file.close()
