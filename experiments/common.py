"""What align.py and finetune.py share: the flags of a training run, and how one is carried out."""

import contextlib
import dataclasses
import functools
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from absl import flags, logging

from experiments import reports
from experiments.config_flags import flag
from jaxvaccine import data, defenses, optim, runs, training
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.checkpoints.orbax_state import open_checkpoints
from jaxvaccine.checkpoints.peft import load_adapter, read_lora_config, save_adapter
from jaxvaccine.data.batching import stream_seed
from jaxvaccine.json_files import read_json_object
from jaxvaccine.llama import Llama, merge_adapter
from jaxvaccine.llama_config import LlamaConfig, LoraConfig

# Fields that do not change a run's result: recorded, and free to change when it is continued.
OPERATIONAL = ("run_dir", "overwrite", "save_every", "progress", "remat", "judge_key_variable", "judge_timeout",
               "judge_attempts", "judge_workers", "judge_cache")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Flags of every training run."""

    run_dir: str = flag("", "Folder of this run, such as runs/booster. Re-running the same command continues it.")
    dtype: Literal["checkpoint", "float32", "bfloat16", "float16"] = flag(
        "checkpoint", "Type of the frozen weights and of the computation; the adapter is float32.")
    remat: Literal["none", "dots", "full"] = flag(
        "full", "What is recomputed in the backward pass: nothing, all but matrix products, or everything in a layer.")
    learning_rate: float = flag(5e-4, "Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = flag("constant", "Learning rate after the warm-up.")
    warmup_ratio: float = flag(0.0, "Part of all steps over which the learning rate rises from 0.")
    weight_decay: float = flag(0.1, "Decoupled weight decay of AdamW.")
    clip_norm: float = flag(1.0, "Largest global norm of a gradient; 0 turns clipping off.")
    batch_size: int = flag(10, "Rows of a batch.")
    epochs: float = flag(20.0, "Passes over the data; not used if --steps is given.")
    steps: int = flag(0, "Training steps; 0 takes --epochs.")
    max_length: int = flag(256, "Tokens at which prompt and answer are cut.")
    bucket: int = flag(64, "Batches are padded to a multiple of this many tokens.")
    seed: int = flag(0, "Everything random derives from it.")
    save_every: int = flag(500, "Steps between checkpoints; 0 saves at the end only.")
    progress: bool = flag(True, "Draw a progress bar.")
    overwrite: bool = flag(False, "Delete an earlier run in --run_dir and start again.")

    def __post_init__(self):
        require(self, "run_dir", bool(self.run_dir), "a folder")
        for name in ("batch_size", "max_length", "bucket"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("steps", "save_every", "seed"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "epochs", self.epochs > 0, "more than 0")
        self.optimizer()

    def optimizer(self) -> optim.OptimizerConfig:
        return optim.OptimizerConfig(
            self.learning_rate, self.schedule, self.warmup_ratio, self.weight_decay, self.clip_norm)


@contextlib.contextmanager
def readable_errors(script: str, argv: Sequence[str]) -> Iterator[None]:
    """Ends a script with the message of an error in its input; --verbosity=1 shows where it was raised.

    Unless --verbosity is given, Orbax's notes on every checkpoint are left out.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"found arguments {argv[1:]}, expected flags only")
        yield
    except (ValueError, KeyError, FileNotFoundError, FileExistsError, FloatingPointError, ConnectionError) as error:
        logging.debug("%s", error, exc_info=True)
        sys.exit(f"{script}: {error}")


def require(config: Any, name: str, holds: bool, expected: str) -> None:
    """Raises ValueError naming flag, found and expected, unless it holds."""
    if not holds:
        raise ValueError(f"--{name}: found {getattr(config, name)!r}, expected {expected}")


def require_numbers(config: Any, *names: str) -> None:
    """Raises ValueError unless each of these flags lists at least one whole number, none of them negative."""
    for name in names:
        texts = getattr(config, name)
        require(config, name, bool(texts) and all(text.isdecimal() for text in texts), "numbers of at least 0")


def check_sources(config: Any, *names: str) -> None:
    """Parses the data flags, so that a mistake in one is found before anything is loaded."""
    for name in names:
        if value := getattr(config, name):
            try:
                data.parse_sources(value)
            except ValueError as error:
                raise ValueError(f"--{name}: {error}") from error


def load_sources(sources: str) -> list[data.Example]:
    """The examples of a data flag; none for an empty one."""
    return data.load_examples(sources) if sources else []


def prompts_of(examples: Sequence[data.Example]) -> list[str]:
    return sorted({data.fingerprint(example) for example in examples})


def read_architecture(model: str) -> LlamaConfig:
    """The model's config.json, read before its weights so that flags can be checked against it."""
    path = hugging_face.resolve_model(model) / "config.json"
    return LlamaConfig.from_hugging_face(read_json_object(path), str(path))


@functools.lru_cache(maxsize=1)
def _load_base(model: str, dtype: str) -> tuple[Llama, Any]:
    # One model stays loaded, so that run.py does not read the weights again for every phase.
    return hugging_face.load_model(model, dtype=None if dtype == "checkpoint" else dtype)


def peak_resident_memory() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_base() -> None:
    """Frees the weights that `load_base` keeps, once nobody else holds them."""
    _load_base.cache_clear()


class Base(NamedTuple):
    """The frozen model that a run starts from, and what it was made of."""

    model: Llama  # without LoRA sites
    frozen: Any
    adapter: Any  # of the run that is continued, else None
    lora: LoraConfig | None  # the sites of `adapter`


def load_base(model: str, dtype: str, run_dir: str | None = None, merge: bool = False) -> Base:
    """A model as it comes, or as a run left it.

    Args:
      model: directory, hub id or GGUF file.
      dtype: as of --dtype.
      run_dir: a finished run of align.py or finetune.py whose result is loaded.
      merge: merge its adapter into the weights, instead of returning it.
    """
    llama, frozen = _load_base(model, dtype)
    if run_dir is None:
        return Base(llama, frozen, None, None)
    flags = runs.read_config(run_dir)["flags"]
    if flags.get("adapter") == "new":
        # The attack trained a fresh adapter on the merged aligned weights.
        frozen = load_base(model, dtype, flags["aligned"], merge=True).frozen
    lora = read_lora_config(adapter_dir(run_dir))
    adapted = llama.clone(lora=lora)
    adapter = load_adapter(adapter_dir(run_dir), adapted)
    if merge:
        # There is not room for two 7B models: the merged weights take the place of those that were loaded.
        _load_base.cache_clear()
        merge_in_place = jax.jit(merge_adapter, static_argnums=0, donate_argnums=2)
        return Base(llama, merge_in_place(adapted, adapter, frozen), None, None)
    return Base(llama, frozen, adapter, lora)


def adapter_dir(run_dir: str | Path) -> Path:
    return Path(run_dir) / "adapter"


def is_finished(run_dir: str) -> bool:
    return adapter_dir(run_dir).is_dir()


def require_finished(name: str, run_dir: str) -> dict[str, Any]:
    """The config of a finished run.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: it has not finished.
    """
    config = runs.read_config(run_dir)
    if not is_finished(run_dir):
        raise ValueError(f"--{name}: found {run_dir!r}, a run that has not finished; re-run its command first")
    return config


def count_steps(config: TrainingConfig, sources: Mapping[str, tuple[data.TokenizedExamples, int]]) -> int:
    """How many steps a run makes: --steps, or --epochs of the first source."""
    tokenized, batch_size = next(iter(sources.values()))
    return config.steps or data.steps_for(len(tokenized.input_ids), batch_size, config.epochs)


def train(
    config: TrainingConfig,
    run_dir: Path,
    base: Base,
    lora: LoraConfig,
    adapter: Any,
    defense: Callable[[Llama], defenses.Defense],
    sources: Mapping[str, tuple[data.TokenizedExamples, int]],
    base_model: str,
    title: str,
) -> None:
    """Trains `adapter`, or continues from the run's newest checkpoint, and writes the run's report and adapter.

    Args:
      config: flags.
      run_dir: the run's folder.
      base: the frozen model.
      lora: the adapter's sites.
      adapter: where training starts.
      defense: makes the gradient estimator for a model.
      sources: of `data.training_batches`; its first decides how many steps an epoch has.
      base_model: recorded in the PEFT adapter.
      title: of the report.
    """
    model = base.model.clone(lora=lora, remat=config.remat)
    steps = count_steps(config, sources)
    estimator = defense(model)
    optimizer = optim.layer_masked_adamw(config.optimizer(), steps)
    state = training.init_train_state(adapter, estimator, optimizer)
    with open_checkpoints(run_dir / "checkpoints") as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        state = training.fit(
            training.make_train_step(estimator, optimizer), state, base.frozen,
            data.training_batches(sources, config.seed, config.bucket), steps=steps,
            key=jax.random.key(stream_seed(config.seed, "training") % 2**32),
            metrics_path=run_dir / "metrics.jsonl", save=checkpoints.save, save_every=config.save_every,
            vocab_size=model.config.vocab_size, progress=config.progress, description=str(run_dir))
    reports.write_training_report(run_dir, title)
    # Last: a run with an adapter has finished.
    save_adapter(state.adapter, model, adapter_dir(run_dir), base_model=base_model)


def fresh_key(config: TrainingConfig) -> jax.Array:
    """The key of a new adapter's initialisation."""
    return jax.random.key(stream_seed(config.seed, "adapter") % 2**32)


def result_flags(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config's fields as (those that determine the result, the operational ones)."""
    fields = dataclasses.asdict(config)
    return ({k: v for k, v in fields.items() if k not in OPERATIONAL},
            {k: v for k, v in fields.items() if k in OPERATIONAL})


def lora_of(config: Any) -> LoraConfig:
    return LoraConfig(config.rank, config.lora_alpha, config.dropout, tuple(config.targets))
