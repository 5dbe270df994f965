"""What the stages share: the model that a run left, a run's folder, and how a training run is carried out."""

import functools
import os
import resource
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jaxvaccine import data, defenses, optim, training
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.checkpoints.identity import adapter_identity
from jaxvaccine.checkpoints.orbax_state import open_checkpoints
from jaxvaccine.checkpoints.peft import load_adapter, read_lora_config, save_adapter, sum_adapters
from jaxvaccine.checkpoints.resolve import loadable_name
from jaxvaccine.data.batching import stream_seed
from jaxvaccine.experiment import chain, inputs, runs
from jaxvaccine.experiment.config import FieldError, flat
from jaxvaccine.experiment.parts import RunPart, TrainingPart, TrainingRunPart, split_operational
from jaxvaccine.json_files import read_json_object
from jaxvaccine.llama import Llama
from jaxvaccine.llama_config import LlamaConfig, LoraConfig
from jaxvaccine.merging import freeze_adapter, merge_adapter
from jaxvaccine.quantisation import Kind

# Of `data.training_batches`: {name: (examples, batch size)}; the first decides how many steps an epoch has.
Sources = Mapping[str, tuple[data.TokenizedExamples, int]]


class Base(NamedTuple):
    """The frozen model that a run starts from, and what it was made of."""

    model: Llama  # without LoRA sites
    frozen: Any
    adapter: Any  # of the run that is continued, else None
    lora: LoraConfig | None  # the sites of `adapter`


def read_architecture(model: str, revision: str = "") -> LlamaConfig:
    """The model's config.json, read before its weights so that settings can be checked against it."""
    path = hugging_face.resolve_model(model, revision or None) / "config.json"
    return LlamaConfig.from_hugging_face(read_json_object(path), str(path))


def load_tokenizer(model: str, revision: str = ""):
    """The model's tokenizer, whose ids its embedding has.

    Raises:
      ValueError: as of `data.load_tokenizer` and `data.check_vocabulary`.
    """
    tokenizer = data.load_tokenizer(hugging_face.resolve_model(model, revision or None))
    data.check_vocabulary(tokenizer, read_architecture(model, revision).vocab_size)
    return tokenizer


def _asked(dtype: str) -> str | None:
    return None if dtype == "checkpoint" else dtype


def loaded_dtype(model: str, dtype: str, revision: str = "") -> str:
    """The name of the type that a model's weights are read as, of `ModelPart.dtype`."""
    return hugging_face.loaded_dtype(hugging_face.resolve_model(model, revision or None), _asked(dtype))


@functools.lru_cache(maxsize=1)
def _load_backbone(directory: Path, dtype: str, quantisation: Kind, weights: tuple[str, ...]) -> tuple[Llama, Any]:
    # One model stays loaded, so that a plan does not read the weights again for every stage.
    del weights  # their hashes, so that others in the same place are not taken for them
    return hugging_face.load_model(directory, dtype=_asked(dtype), quantisation=quantisation)


def forget_backbone() -> None:
    """Frees the weights that `load_base` keeps, once nobody else holds them."""
    _load_backbone.cache_clear()


def load_base(model: str, dtype: str, run_dir: str | Path | None = None, merge: bool = False, revision: str = "",
              quantisation: Kind = "none") -> Base:
    """A model as it comes, or as a run left it.

    Args:
      model: directory, hub id or GGUF file.
      dtype: as of `ModelPart`.
      run_dir: a finished alignment or attack whose result is loaded, an adapter or a whole model, and if it stands on
        others, what they left under it.
      merge: merge its adapter into the weights, instead of returning it; beside quantised ones it is frozen.
      revision: of a hub id.
      quantisation: as of `ModelPart`; of a run, that run's.

    Raises:
      FieldError: as of `inputs.require_finished`.
    """
    identity = inputs.of_model(model, revision)
    if run_dir is not None and inputs.left_model(run_dir):
        # It stands for itself, and is read as the model that it is made of.
        inputs.require_finished("run_dir", str(run_dir))
        return load_base(str(inputs.model_dir(run_dir)), loaded_dtype(model, dtype, revision))
    llama, frozen = _load_backbone(hugging_face.resolve_model(model, revision or None), dtype, quantisation, tuple(
        digest for part in ("weights", "config") for digest in identity[part].values()))
    if run_dir is None:
        return Base(llama, frozen, None, None)
    config, folder = inputs.require_finished("run_dir", str(run_dir)), inputs.adapter_dir(run_dir)
    if other := runs.differences(config["data"]["inputs"]["model"], identity, f"{run_dir} has", "there is"):
        raise FieldError("model", f"found {model!r}, expected the model of {run_dir}: " + "; ".join(other))
    if under := chain.merged_under(run_dir):
        # It trained an adapter on the weights with what an earlier run left merged in.
        frozen = load_base(model, dtype, under, True, revision, quantisation).frozen
        folder = folder.with_name(inputs.TRAINED)
    lora = read_lora_config(folder)
    adapted = llama.clone(lora=lora)
    adapter = load_adapter(folder, adapted)
    if merge and quantisation != "none":
        return Base(llama, jax.jit(freeze_adapter, static_argnums=0)(adapted, adapter, frozen), None, None)
    if merge:
        # There is not room for two 7B models: the merged weights take the place of those that were loaded.
        forget_backbone()
        merge_in_place = jax.jit(merge_adapter, static_argnums=0, donate_argnums=2)
        return Base(llama, merge_in_place(adapted, adapter, frozen), None, None)
    return Base(llama, frozen, adapter, lora)


def prompts_of(examples: Sequence[data.Example]) -> list[str]:
    """Fingerprints, each once; of a conversation those of its earlier questions too."""
    return sorted({found for example in examples for found in data.fingerprints(example)})


def open_run(config: Any, run: RunPart, script: str, examples: Mapping[str, Sequence[data.Example]],
             made_of: Mapping[str, Any], more: Mapping[str, Any] = MappingProxyType({}),
             flags: Mapping[str, Any] = MappingProxyType({}), changeable: Collection[str] = (), write: bool = True
             ) -> Path:
    """`runs.open_run` of a config, of the examples that it reads and of its other inputs.

    made_of: `inputs.of_model` and the like, by what it is of. more: of the data, beside that and the examples' hashes.
    flags: beside the config's own. changeable, write: as of `runs.open_run`.
    """
    result, operational = split_operational(flat(config))
    return runs.open_run(run.run_dir, script, {**flags, **result}, {
        "hashes": {name: runs.examples_hash(rows) for name, rows in examples.items()}, "inputs": made_of, **more},
        operational, run.overwrite, changeable, write)


def training_record(examples: Mapping[str, Sequence[data.Example]], tokenized: Mapping[str, data.TokenizedExamples],
                    accounts: Mapping[str, Sequence[data.Account]] = MappingProxyType({}),
                    shared: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What later stages and reports ask of a training run: the accounts of its sources, which prompts it has seen, and
    how many of them its sets have in common.

    accounts: of data that was drawn from more than what is tokenized; the others are those of the examples.
    shared: as of `data.shared_prompts`; of the alignment and harmful examples unless given.
    """
    found = {name: data.tally(data.accounts_of(examples[name]), examples[name], rows.fates, rows.lengths)
             for name, rows in tokenized.items()}
    drawn = [(examples[name], rows.lengths) for name, rows in tokenized.items()]
    accounts = {name: functools.reduce(lambda of, rows: data.with_tokens(of, *rows), drawn, of)
                for name, of in accounts.items()}
    prompts = {name: prompts_of(rows) for name, rows in examples.items()}
    if shared is None:  # harmless answers have the harmful prompts by what they are
        shared = data.shared_prompts({name: of for name, of in prompts.items() if name != "harmless"})
    return {"accounts": tell({**found, **accounts}), "prompts": prompts, "shared": tell_shared(shared)}


def tell(accounts: Mapping[str, Sequence[data.Account]]) -> dict[str, Any]:
    """The accounts' record, after each was printed, a line a source."""
    for name, of in accounts.items():
        for account in of:
            _say_once(f"{name}: {data.describe(account)}")
    return data.record(accounts)


def tell_shared(shared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What sets of prompts have in common, after it was printed, a line a set that has something."""
    for name, of in shared.items():
        if of["shared"]:
            _say_once(f"{name}: of {of['prompts']} prompts " + ", ".join(
                f"{count} also in {other}" for other, count in of["shared"].items()))
    return dict(shared)


@functools.cache
def _say_once(line: str) -> None:
    # The cells of a plan read the same files.
    print(line, file=sys.stderr)


def count_steps(training: TrainingPart, sources: Sources) -> int:
    """How many steps a run makes."""
    tokenized, _ = next(iter(sources.values()))
    return training.count_steps(len(tokenized.input_ids))


def longest_batch(sources: Sources, bucket: int) -> int:
    """The longest that a batch is padded to, in tokens."""
    return data.bucket_length(max(len(ids) for rows, _ in sources.values() for ids in rows.input_ids), bucket)


def fresh_key(seed: int) -> jax.Array:
    """The key of a new adapter's initialisation."""
    return jax.random.key(stream_seed(seed, "adapter") % 2**32)


def training_key(seed: int) -> jax.Array:
    """The key of all that is drawn in training: dropout, T-Vaccine's layers, RepNoise's noise."""
    return jax.random.key(stream_seed(seed, "training") % 2**32)


class Origin(NamedTuple):
    """What an adapter is of: the model as it comes, or that with another run's adapter merged in."""

    model: str
    revision: str = ""
    aligned: str = ""  # the run whose adapter was merged


def train(run_dir: Path, base: Base, model: Llama, adapter: Any, defense: Callable[[Llama], defenses.Defense],
          sources: Sources, part: TrainingPart, run: TrainingRunPart, bucket: int, of: Origin) -> None:
    """Trains `adapter`, or continues from the run's newest checkpoint, and writes the adapter.

    of: what the adapter is of. Other arguments as of `fit`.
    """
    trained, steps = fit(run_dir, base, model, adapter, defense, sources, part, run, bucket)
    leave_adapter(run_dir, trained, model, of, steps)


def fit(run_dir: Path, base: Base, model: Llama, adapter: Any, defense: Callable[[Llama], defenses.Defense],
        sources: Sources, part: TrainingPart, run: TrainingRunPart, bucket: int) -> tuple[Any, int]:
    """Trains `adapter`, or continues from the run's newest checkpoint; returns it trained, and the number of steps.

    Args:
      run_dir: the run's folder.
      base: the frozen model.
      model: with the adapter's LoRA sites.
      adapter: where training starts: an adapter, or whatever else a defense of the model trains.
      defense: makes the gradient estimator for a model.
      sources: what batches are drawn from.
      part: optimizer, batch size and length.
      run: seed, checkpoints and progress.
      bucket: multiple, in tokens, to which batches are padded.
    """
    steps, estimator = count_steps(part, sources), defense(model)
    optimizer = optim.layer_masked_optimizer(part.optimizer(), steps)
    state = training.init_train_state(adapter, estimator, optimizer)
    lengths = data.batch_lengths([sources], [run.seed], bucket, steps)
    with open_checkpoints(run_dir / "checkpoints") as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        state = training.fit(
            training.make_train_step(estimator, optimizer), state, base.frozen,
            data.training_batches(sources, run.seed, bucket, lengths), steps=steps, key=training_key(run.seed),
            metrics_path=run_dir / "metrics.jsonl", save=checkpoints.save, save_every=run.save_every,
            vocab_size=model.config.vocab_size, progress=run.progress, description=str(run_dir))
    return state.adapter, steps


def leave_adapter(run_dir: Path, adapter: Any, model: Llama, of: Origin, steps: int) -> None:
    """Writes what a run leaves, and its hashes, so that a run with an adapter has finished.

    The adapter in adapter/ is one of the model as it comes, which PEFT loads by its config. If `adapter` was trained on
    merged weights, it is both updates in one, and trained_adapter/ has the new one by itself.
    """
    name, lora = loadable_name(of.model), model.lora
    if of.aligned:
        save_adapter(adapter, model, run_dir / inputs.TRAINED, f"({name} with {of.aligned} merged in)")
        aligned_dir = inputs.adapter_dir(of.aligned)
        aligned = model.clone(lora=read_lora_config(aligned_dir))
        lora, adapter = sum_adapters(aligned.lora, load_adapter(aligned_dir, aligned), lora, adapter)
    # Beside its place first, so that its hashes are there when it is.
    staged = run_dir / f"{inputs.ADAPTER}.tmp"
    save_adapter(adapter, model.clone(lora=lora), staged, name, revision=of.revision)
    left = inputs.of_adapters(run_dir)
    inputs.record_results(run_dir, steps, {**left, inputs.ADAPTER: adapter_identity(staged)})
    os.replace(staged, inputs.adapter_dir(run_dir))


def peak_resident_memory() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
