"""What is measured of lanes while they are aligned and attacked: losses and gradient norms on harmful examples."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, lanes, sweep
from experiments.align import AlignConfig
from experiments.sweep_report import ALIGNED
from jaxvaccine import data, defenses, runs
from jaxvaccine.checkpoints.peft import load_adapter, save_adapter
from jaxvaccine.defenses.base import squared_norm
from jaxvaccine.defenses.vaccine import activation_gradient
from jaxvaccine.llama import Llama
from jaxvaccine.losses import causal_lm_loss

Measured = dict[str, np.ndarray]


def _over_lanes(fn: Callable, own_base: bool) -> Callable:
    return jax.jit(jax.vmap(fn, in_axes=(0, 0 if own_base else None, 0)))


@functools.lru_cache(maxsize=8)
def _layer_norms(model: Llama, own_base: bool):
    loss_fn = causal_lm_loss(model)

    def measure(adapter, frozen, batch):
        _, sites = activation_gradient(loss_fn, adapter, frozen, batch, None)
        grads = jax.grad(loss_fn, has_aux=True)(adapter, frozen, batch)[0]
        return {name: jnp.sqrt(squared_norm(tree, first_axis=1))
                for name, tree in (("activation_gradient_norm", sites), ("weight_gradient_norm", grads))}

    return _over_lanes(measure, own_base)


def layer_norms(of: lanes.Lanes, batches) -> Measured:
    """‖∇_{a_l} h‖, as T-Vaccine's probe takes it (without dropout), and ‖∇_{w_l} h‖ of the layer's adapter.

    batches: leaves [N, B, T], a harmful batch for every lane. Both norms are [N, L].
    """
    return jax.device_get(_layer_norms(of.model, of.own_base)(of.adapters, of.frozen, batches))


@functools.lru_cache(maxsize=8)
def _losses(model: Llama, own_base: bool):
    loss_fn = causal_lm_loss(model)
    return _over_lanes(lambda adapter, frozen, batch: loss_fn(adapter, frozen, batch)[0], own_base)


def losses(of: lanes.Lanes, batches) -> np.ndarray:
    """The loss of every lane, [N], on its batch; leaves [N, B, T]."""
    return jax.device_get(_losses(of.model, of.own_base)(of.adapters, of.frozen, batches))


@functools.lru_cache(maxsize=8)
def _harmful_losses(model: Llama, own_base: bool, alpha: float):
    # Booster's gradient for its metrics; XLA leaves out what only the gradient needs.
    booster = defenses.booster(causal_lm_loss(model), lam=0.0, alpha=alpha)

    def measure(adapter, frozen, batch):
        _, _, metrics = booster.gradient(adapter, frozen, (), {"alignment": batch, "harmful": batch}, None)
        return {name: metrics[name] for name in ("harmful_loss", "perturbed_harmful_loss", "harmful_gradient_norm")}

    return _over_lanes(measure, own_base)


def harmful_losses(of: lanes.Lanes, batches, alpha: float) -> Measured:
    """harmful_loss h(w), perturbed_harmful_loss h(w') and harmful_gradient_norm ‖∇h(w)‖ as `defenses.booster` has them.

    batches: leaves [N, B, T], a harmful batch for every lane. All three are [N].
    """
    return jax.device_get(_harmful_losses(of.model, of.own_base, alpha)(of.adapters, of.frozen, batches))


def stack_batches(tokenizer, examples: Sequence[Sequence[data.Example]], config: common.TrainingConfig) -> Any:
    """Every lane's examples as one batch: leaves [N, B, T]. B is the least that a lane has, after tokenization."""
    tokenized = [data.tokenize_examples(tokenizer, rows, config.max_length) for rows in examples]
    count = min(len(rows.input_ids) for rows in tokenized)
    length = data.bucket_length(max(len(ids) for rows in tokenized for ids in rows.input_ids), config.bucket)
    batches = [data.collate(rows, range(count), length) for rows in tokenized]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def open_run(config: Any, script: str, **configs: common.TrainingConfig) -> None:
    """The folder of a run like a sweep's: bases, methods and attacks may grow from one call to the next.

    config: the script's flags; configs: those of the alignment and, where there is one, of the attack.
    """
    grows = ("bases", "methods", "attacks")
    flags = common.result_flags(config)[0]
    fixed = {name: value for name, value in flags.items() if name not in grows}
    runs.open_run(config.run_dir, script, {
        script: fixed, **{name: common.result_flags(of)[0] for name, of in configs.items()},
    }, {}, {name: flags[name] for name in grows if name in flags}, config.overwrite)


def align(config: AlignConfig, base: common.Base, tokenizer, seeds: Sequence[int], folder: Path,
          measure: Callable[[int, lanes.Lanes], Measured], every: int) -> lanes.Lanes:
    """Aligned lanes: those of an earlier call, or new ones, one adapter saved per seed.

    What `measure(step, lanes)` returns after every `every` steps, and at both ends, lies in the folder's aligned.json:
    {"steps": [S], name: [S, N, ...]}.
    """
    start, result = lanes.fresh(base, config, seeds), folder / f"{ALIGNED}.json"
    paths = [folder / f"seed{seed}" for seed in seeds]
    if result.exists():
        return start._replace(adapters=lanes.stack([load_adapter(path, start.model) for path in paths]))
    sources = sweep.align_sources(config, tokenizer)
    last, steps, measured = common.count_steps(config, sources), [], []

    def observe(step, of):
        if step % every == 0 or step == last:
            steps.append(step)
            measured.append(measure(step, of))

    aligned, _ = lanes.train(start, config, [sources] * len(seeds), seeds, observe)
    for i, path in enumerate(paths):
        save_adapter(lanes.take(aligned.adapters, i), aligned.model, path, base_model=config.model)
    runs.write_json(result, {"steps": steps, **{
        name: to_json(np.stack([m[name] for m in measured])) for name in measured[0]}})
    return aligned


def to_json(values: np.ndarray) -> Any:
    """Nested lists of floats, of seven significant digits."""
    return np.vectorize(lambda x: float(f"{x:.7g}"), otypes=[float])(values).tolist()
