"""The same training steps by jaxvaccine and by plain PyTorch: same weights, adapter, batches and draws.

`jax_steps` and `torch_steps` each walk through a `Problem` and yield a `StepRecord` per step; `compare` says how far
two such records are apart. PyTorch is imported only by `torch_steps`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvaccine import llama, optim, training
from jaxvaccine.activation_losses import layer_noise
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.conventions import IGNORED, at_least_float32
from jaxvaccine.defenses.booster import booster_keys
from jaxvaccine.defenses.repnoise import repnoise_keys
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.config import make
from jaxvaccine.experiment.methods import Booster, Tar, uses
from jaxvaccine.llama_config import LlamaConfig

# What is compared, as flat values of an alignment.
METHODS: dict[str, dict[str, str]] = {
    "sft": {"defense": "sft"},
    "vaccine": {"defense": "vaccine"},
    "t_vaccine": {"defense": "t_vaccine"},
    "t_vaccine_released": {"defense": "t_vaccine", "freeze": "released"},
    "booster": {"defense": "booster"},
    "vaccine_booster": {"defense": "booster", "base_defense": "vaccine"},
    "t_vaccine_booster": {"defense": "booster", "base_defense": "t_vaccine"},
    "repnoise": {"defense": "repnoise"},
    "repnoise_booster": {"defense": "booster", "base_defense": "repnoise"},
    "tar": {"defense": "tar"},
    "tar_booster": {"defense": "booster", "base_defense": "tar"},
}

# Four layers, grouped-query attention, every size different from the others where it can be.
TINY = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2,
                   head_dim=8, max_position_embeddings=128)
# Clipping at work, a warm-up and a cosine, and layers that freeze and come back within a few steps.
TINY_FLAGS: dict[str, Any] = {
    "rank": 4, "lora_alpha": 8.0, "batch_size": 4, "harmful_batch_size": 3, "max_length": 16, "rho": 2.0, "layers": 2,
    "sample_every": 2, "probe_every": 5, "learning_rate": 5e-3, "schedule": "cosine", "warmup_ratio": 0.1,
    "clip_norm": 0.2, "noise_weight": 1.0, "inner_steps": 2, "inner_learning_rate": 1e-2}
# RepNoise reads more data than the others, and TAR more of them: what batches for all methods are made for.
INNER_STEPS = TINY_FLAGS["inner_steps"]


class Problem(NamedTuple):
    """All that determines a training run on either side."""

    config: AlignConfig  # method, LoRA and optimizer; its dtype is not used, dropout must be 0
    dtype: str  # float64 too
    model_dir: str  # Hugging Face directory of the base
    adapter: Any  # where training starts: a LoRA tree of numpy arrays, leaves [L, ...] float32
    batches: Sequence[Mapping[str, Mapping[str, np.ndarray]]]  # one {"alignment": batch, "harmful": batch, …} per step


class StepRecord(NamedTuple):
    """What one side did in a step."""

    loss: float
    gradient: Any  # before clipping, a tree like the adapter
    adapter: Any  # after the step
    active_layers: np.ndarray | None  # [L] bool, T-Vaccine's
    probabilities: np.ndarray | None  # [L], T-Vaccine's
    seconds: float  # of the step; the first one's includes compilation


class Difference(NamedTuple):
    """How far two records of one step are apart."""

    loss: float  # |a − b|
    gradient: float  # ‖a − b‖ / ‖b‖ over the whole tree
    cosine: float  # of the angle between the gradients; 1 if both are 0
    adapter: float  # ‖a − b‖ / ‖b‖
    movement: float  # ‖a − b‖ / ‖b − start of training‖
    probabilities: float  # largest |a − b|; 0 without them


def _remember_gradient() -> optax.GradientTransformation:
    """Keeps what reaches the optimizer in its state, so that the one compiled step shows it."""
    return optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))


def jax_steps(problem: Problem, defense_of: Callable[[llama.Llama], Any] | None = None) -> Iterator[StepRecord]:
    """Trains with jaxvaccine's own train step. float64 needs jax_enable_x64, and makes the adapter float64 too.

    defense_of: model -> the `Defense`; by default the one that the config names.
    """
    config, steps = problem.config, len(problem.batches)
    model, frozen = hugging_face.load_model(problem.model_dir, lora=config.adapter.lora(), dtype=problem.dtype)
    model = config.model.on(model)
    adapter_dtype = at_least_float32(model.dtype)
    adapter = jax.tree.map(lambda x: jnp.asarray(x, adapter_dtype), problem.adapter)
    defense = (defense_of or config.method.make)(model)
    optimizer = optax.chain(
        _remember_gradient(), optim.layer_masked_adamw(config.training.optimizer(), steps))
    train_step = training.make_train_step(defense, optimizer)
    state = training.init_train_state(adapter, defense, optimizer)
    for batches in problem.batches:
        started = time.perf_counter()
        state, metrics = train_step(state, frozen, batches, jax.random.key(config.run.seed))
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
        gradient, adapter, metrics = jax.device_get((state.optimizer[0], state.adapter, metrics))
        yield StepRecord(float(metrics["loss"]), gradient, adapter, metrics.get("active_layers"),
                         metrics.get("probabilities"), seconds)


def repnoise_noise(problem: Problem, step: int, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    """The noise that RepNoise draws in a step: random draws are shared between the two sides."""
    # The reference may run in a process of its own, in which JAX has no float64 yet.
    with jax.enable_x64(problem.dtype == "float64"):
        key = training.step_key(jax.random.key(problem.config.run.seed), step)
        if isinstance(problem.config.method, Booster):
            key = booster_keys(key).base
        return np.array(layer_noise(repnoise_keys(key).noise, layer, shape, at_least_float32(problem.dtype)))


def torch_steps(problem: Problem, drawn: Sequence[np.ndarray | None], gradient=None) -> Iterator[StepRecord]:
    """Trains with the reference.

    Args:
      problem: what to train.
      drawn: per step the active layers [L] bool that T-Vaccine is to draw (`StepRecord.active_layers` of the other
        side), None for other methods. The probabilities are the reference's own.
      gradient: a `pytorch_reference.Gradient`; by default that of the method which the config names.
    """
    from experiments.parity import pytorch_methods
    from experiments.parity import pytorch_reference as reference

    config, steps = problem.config, len(problem.batches)
    model = reference.TorchModel(
        reference.load_base(problem.model_dir, problem.dtype), config.adapter.lora(), problem.adapter)
    optimizer = reference.TorchOptimizer(model, config.training.optimizer(), steps)
    t_vaccine = pytorch_methods.scheduled(config.method, lambda step, *_: np.flatnonzero(drawn[step]))
    gradient = gradient or pytorch_methods.gradient_of(
        config.method, t_vaccine, lambda *of: repnoise_noise(problem, done, *of))
    for done, batches in enumerate(problem.batches):  # noqa: B007, the noise is drawn for it
        started = time.perf_counter()
        loss = float(gradient(model, batches))
        grads = model.gradients()
        optimizer.step()
        seconds = time.perf_counter() - started
        active = None
        if t_vaccine and t_vaccine.step:
            active = np.isin(np.arange(len(model.layers)), t_vaccine.active)
        yield StepRecord(loss, grads, model.weights(), active,
                         t_vaccine.probabilities if t_vaccine else None, seconds)


def dot(a, b) -> float:
    """Σ a · b over two trees, in float64."""
    return sum(float(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64)))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def distance(a, b) -> float:
    """‖a − b‖ over two trees, in float64."""
    difference = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b)
    return math.sqrt(dot(difference, difference))


def _ratio(a: float, b: float) -> float:
    return 0.0 if a == 0 else a / b if b else math.inf


def compare(found: StepRecord, expected: StepRecord, start) -> Difference:
    """How far `found` is from `expected`, of a training that started at the adapter `start`."""
    probabilities = 0.0
    if found.probabilities is not None:
        probabilities = float(np.abs(np.asarray(found.probabilities) - np.asarray(expected.probabilities)).max())
    norms = [math.sqrt(dot(record.gradient, record.gradient)) for record in (found, expected)]
    apart = distance(found.adapter, expected.adapter)
    return Difference(
        loss=abs(found.loss - expected.loss),
        gradient=_ratio(distance(found.gradient, expected.gradient), norms[1]),
        cosine=(dot(found.gradient, expected.gradient) / (norms[0] * norms[1]) if all(norms)
                else float(norms[0] == norms[1])),
        adapter=_ratio(apart, math.sqrt(dot(expected.adapter, expected.adapter))),
        movement=_ratio(apart, distance(expected.adapter, start)),
        probabilities=probabilities)


def tiny_batch(rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
    """Random right-padded rows of different lengths, of each of which the second half is supervised."""
    lengths = rng.integers(length // 2 + 2, length + 1, rows)[:, None]
    position = np.arange(length)[None]
    ids = rng.integers(0, TINY.vocab_size, (rows, length))
    counts = position < lengths
    return {"input_ids": np.where(counts, ids, 0).astype(np.int32),
            "labels": np.where(counts & (position >= lengths // 2), ids, IGNORED).astype(np.int32),
            "attention_mask": counts.astype(np.int32)}


def other_answers(rng: np.random.Generator, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows with the prompts of these, and answers of other lengths of which some tokens are the same."""
    ids, labels, mask = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    prompts = ((labels == IGNORED) & (mask == 1)).sum(axis=1, keepdims=True)
    position = np.arange(ids.shape[1])[None]
    counts = position < rng.integers(prompts + 1, ids.shape[1] + 1)
    answers = np.where(rng.random(ids.shape) < 0.2, ids, rng.integers(0, TINY.vocab_size, ids.shape))
    other = np.where(counts, np.where(position < prompts, ids, answers), 0).astype(np.int32)
    return {"input_ids": other, "labels": np.where(counts & (position >= prompts), other, IGNORED).astype(np.int32),
            "attention_mask": counts.astype(np.int32)}


def tiny_config(**changes: Any) -> AlignConfig:
    """An alignment in TINY_FLAGS with these flat values, for `tiny_problem`; it reads no files."""
    return make(AlignConfig, changes, {
        **TINY_FLAGS, "model": "-", "run_dir": "-", "alignment_data": "embedded_refusal@train",
        "harmful_data": "embedded_harmful@harmful"})


def tiny_problem(model_dir: str | Path, config: AlignConfig, dtype: str = "float32", architecture: LlamaConfig = TINY
                 ) -> Problem:
    """A random LLaMA, written to model_dir unless it is there, and random batches for the config's steps.

    Weights are larger than a real initialisation's, so that the layers differ visibly, and B is not zero, so that every
    part of the gradient is at work from the first step. The batches are the same for all methods.
    """
    model = llama.Llama(architecture, config.adapter.lora())
    seed, length, harmful_rows = config.run.seed, config.data.max_length, config.data.harmful_batch_size
    keys = jax.random.split(jax.random.key(seed))
    if not (Path(model_dir) / "config.json").exists():
        frozen = jax.tree.map(lambda x: x * 8 if x.ndim == 3 else x, llama.init_frozen(model, jax.random.key(0)))
        hugging_face.save_model(model, frozen, model_dir)
    adapter = jax.tree.map(lambda x: np.asarray(x + 0.05 * jax.random.normal(keys[0], x.shape), np.float32),
                           llama.init_adapter(model, keys[1]))
    rng, more = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    batches = [{"alignment": tiny_batch(rng, config.training.batch_size, length),
                "harmful": tiny_batch(rng, harmful_rows, length)} for _ in range(config.training.steps)]
    tar = uses(config.method, Tar)
    rows = harmful_rows * (tar.inner_steps if tar else INNER_STEPS)
    batches = [{**of, "harmless": other_answers(more, of["harmful"]), "adversary": tiny_batch(more, rows, length)}
               for of in batches]
    return Problem(config, dtype, str(model_dir), adapter, batches)
