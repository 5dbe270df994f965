"""What the stages share: the model that a run left, a run's folder, and how a training run is carried out."""

import functools
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jaxvaccine import data, defenses, optim, training
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.checkpoints.orbax_state import open_checkpoints
from jaxvaccine.checkpoints.peft import load_adapter, read_lora_config, save_adapter
from jaxvaccine.data.batching import stream_seed
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.config import FieldError, flat
from jaxvaccine.experiment.parts import OPERATIONAL, RunPart, TrainingPart, TrainingRunPart
from jaxvaccine.json_files import read_json_object
from jaxvaccine.llama import Llama, merge_adapter
from jaxvaccine.llama_config import LlamaConfig, LoraConfig

# Of `data.training_batches`: {name: (examples, batch size)}; the first decides how many steps an epoch has.
Sources = Mapping[str, tuple[data.TokenizedExamples, int]]


class Base(NamedTuple):
    """The frozen model that a run starts from, and what it was made of."""

    model: Llama  # without LoRA sites
    frozen: Any
    adapter: Any  # of the run that is continued, else None
    lora: LoraConfig | None  # the sites of `adapter`


def read_architecture(model: str) -> LlamaConfig:
    """The model's config.json, read before its weights so that settings can be checked against it."""
    path = hugging_face.resolve_model(model) / "config.json"
    return LlamaConfig.from_hugging_face(read_json_object(path), str(path))


@functools.lru_cache(maxsize=1)
def _load_backbone(model: str, dtype: str) -> tuple[Llama, Any]:
    # One model stays loaded, so that a plan does not read the weights again for every stage.
    return hugging_face.load_model(model, dtype=None if dtype == "checkpoint" else dtype)


def forget_backbone() -> None:
    """Frees the weights that `load_base` keeps, once nobody else holds them."""
    _load_backbone.cache_clear()


def load_base(model: str, dtype: str, run_dir: str | Path | None = None, merge: bool = False) -> Base:
    """A model as it comes, or as a run left it.

    Args:
      model: directory, hub id or GGUF file.
      dtype: as of `ModelPart`.
      run_dir: a finished alignment or attack whose result is loaded.
      merge: merge its adapter into the weights, instead of returning it.
    """
    llama, frozen = _load_backbone(model, dtype)
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
        forget_backbone()
        merge_in_place = jax.jit(merge_adapter, static_argnums=0, donate_argnums=2)
        return Base(llama, merge_in_place(adapted, adapter, frozen), None, None)
    return Base(llama, frozen, adapter, lora)


def adapter_dir(run_dir: str | Path) -> Path:
    return Path(run_dir) / "adapter"


def is_finished(run_dir: str | Path) -> bool:
    return adapter_dir(run_dir).is_dir()


def require_finished(name: str, run_dir: str) -> dict[str, Any]:
    """The config.json of a finished run, which the field `name` names.

    Raises:
      FileNotFoundError: there is no such run.
      FieldError: it has not finished.
    """
    config = runs.read_config(run_dir)
    if not is_finished(run_dir):
        raise FieldError(name, f"found {run_dir!r}, a run that has not finished; re-run its command first")
    return config


def prompts_of(examples: Sequence[data.Example]) -> list[str]:
    """Fingerprints, each once."""
    return sorted({data.fingerprint(example) for example in examples})


def open_run(config: Any, run: RunPart, script: str, examples: Mapping[str, Sequence[data.Example]],
             more: Mapping[str, Any] = MappingProxyType({}), flags: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """`runs.open_run` of a config and of the examples that it reads.

    more: of the data, beside the examples' hashes; flags: beside the config's own.
    """
    result, operational = split_operational(flat(config))
    return runs.open_run(run.run_dir, script, {**flags, **result}, {
        "hashes": {name: runs.examples_hash(rows) for name, rows in examples.items()}, **more}, operational,
        run.overwrite)


def training_record(examples: Mapping[str, Sequence[data.Example]], tokenized: Mapping[str, data.TokenizedExamples],
                    accounts: Mapping[str, Sequence[data.Account]] = MappingProxyType({})) -> dict[str, Any]:
    """What later stages and reports ask of a training run: the accounts of its sources, and which prompts it has seen.

    accounts: of data that was drawn from more than what is tokenized; the others are those of the examples.
    """
    found = {name: data.tally(data.accounts_of(examples[name]), examples[name], rows.fates)
             for name, rows in tokenized.items()}
    return {"accounts": tell({**found, **accounts}),
            "prompts": {name: prompts_of(rows) for name, rows in examples.items()}}


def tell(accounts: Mapping[str, Sequence[data.Account]]) -> dict[str, Any]:
    """The accounts' record, after each was printed, a line a source."""
    for name, of in accounts.items():
        for account in of:
            _say_once(f"{name}: {data.describe(account)}")
    return data.record(accounts)


@functools.cache
def _say_once(line: str) -> None:
    # The cells of a plan read the same files.
    print(line, file=sys.stderr)


def split_operational(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat values as (those that determine the result, the operational ones)."""
    return ({name: value for name, value in values.items() if name not in OPERATIONAL},
            {name: value for name, value in values.items() if name in OPERATIONAL})


def count_steps(training: TrainingPart, sources: Sources) -> int:
    """How many steps a run makes."""
    tokenized, _ = next(iter(sources.values()))
    return training.count_steps(len(tokenized.input_ids))


def fresh_key(seed: int) -> jax.Array:
    """The key of a new adapter's initialisation."""
    return jax.random.key(stream_seed(seed, "adapter") % 2**32)


def training_key(seed: int) -> jax.Array:
    """The key of all that is drawn in training: dropout, T-Vaccine's layers, RepNoise's noise."""
    return jax.random.key(stream_seed(seed, "training") % 2**32)


def train(run_dir: Path, base: Base, model: Llama, adapter: Any, defense: Callable[[Llama], defenses.Defense],
          sources: Sources, part: TrainingPart, run: TrainingRunPart, bucket: int, base_model: str) -> None:
    """Trains `adapter`, or continues from the run's newest checkpoint, and writes the adapter.

    Args:
      run_dir: the run's folder.
      base: the frozen model.
      model: with the adapter's LoRA sites.
      adapter: where training starts.
      defense: makes the gradient estimator for a model.
      sources: what batches are drawn from.
      part: optimizer, batch size and length.
      run: seed, checkpoints and progress.
      bucket: multiple, in tokens, to which batches are padded.
      base_model: recorded in the PEFT adapter.
    """
    steps, estimator = count_steps(part, sources), defense(model)
    optimizer = optim.layer_masked_adamw(part.optimizer(), steps)
    state = training.init_train_state(adapter, estimator, optimizer)
    with open_checkpoints(run_dir / "checkpoints") as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        state = training.fit(
            training.make_train_step(estimator, optimizer), state, base.frozen,
            data.training_batches(sources, run.seed, bucket), steps=steps, key=training_key(run.seed),
            metrics_path=run_dir / "metrics.jsonl", save=checkpoints.save, save_every=run.save_every,
            vocab_size=model.config.vocab_size, progress=run.progress, description=str(run_dir))
    # Last: a run with an adapter has finished.
    save_adapter(state.adapter, model, adapter_dir(run_dir), base_model=base_model)


def peak_resident_memory() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
