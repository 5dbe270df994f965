"""What a run left, for others to serve: a whole model with the adapter merged in, or the adapter in PEFT's format, each
with the tokenizer and a model card."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine.checkpoints import files, hugging_face
from jaxvaccine.checkpoints.peft import CONFIG, WEIGHTS
from jaxvaccine.checkpoints.resolve import is_local
from jaxvaccine.experiment import chain, inputs, runs, stage
from jaxvaccine.experiment.config import FieldError, Part, field, require
from jaxvaccine.experiment.judged import RESULTS
from jaxvaccine.experiment.parts import Dtype
from jaxvaccine.experiment.seen import trained_on
from jaxvaccine.json_files import read_json, read_json_object, write_json

CARD = "README.md"
Form = Literal["merged", "adapter"]


@dataclasses.dataclass(frozen=True)
class ExportConfig(Part):
    """Export."""

    trained: str = field("", "Folder of a finished alignment or fine-tuning.")
    directory: str = field("", "Folder to write, which must not be there or be empty.")
    form: Form = field("merged", "merged: a whole model that transformers and vLLM serve; adapter: PEFT's, for the "
                       "model that it was trained on.")
    dtype: Dtype = field("checkpoint", "Type of a merged model's weights; checkpoint is the model's own.")
    base_name: str = field("", "What the base is called in the card and in adapter_config.json, such as its hub id; "
                           "unless given, as the run calls it.")
    scores: tuple[str, ...] = field((), "Folders of evaluations of this run, beside those that lie next to it.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.trained), "trained", self.trained, "the folder of a run")
        require(bool(self.directory), "directory", self.directory, "a folder to write")
        require(self.form == "merged" or self.dtype == "checkpoint", "dtype", self.dtype,
                "none with --form=adapter, which is written as it was trained, in float32")


class Evaluation(NamedTuple):
    """An evaluation of the run: its folder, its config.json and its results.json."""

    folder: str
    config: dict[str, Any]
    results: dict[str, Any]


class Exported(NamedTuple):
    """What a model card tells of.

    Attributes:
      name: of the folder that is written.
      form: as of `ExportConfig`.
      base: what the model below is called.
      dtype: of a merged model's weights, "float32" of an adapter.
      links: the chain of runs that ends with the one that is exported.
      evaluations: of that run.
    """

    name: str
    form: Form
    base: str
    dtype: str
    links: tuple[chain.Link, ...]
    evaluations: tuple[Evaluation, ...]


def export(config: ExportConfig, card: Callable[[Exported], str]) -> Path:
    """Writes the folder, all of it or nothing.

    A merged model has W + (alpha / rank) A B in the place of W, summed in float32 and rounded to its type.

    Args:
      config: what is written where.
      card: makes the text of README.md.

    Raises:
      FieldError: the run has not finished, has changed since or is none that trains; the folder holds something;
        weights that trained beside quantised ones are to be merged; an evaluation is of another run.
      FileNotFoundError: there is no such run or evaluation.
    """
    directory = Path(config.directory).expanduser()
    require(not directory.exists() or (directory.is_dir() and not any(directory.iterdir())), "directory",
            config.directory, "a folder that is not there, or an empty one: nothing is overwritten")
    script = runs.read_config(config.trained).get("script")
    require(script in ("align", "finetune"), "trained", config.trained, f"a run of align or finetune, not of {script}")
    run = inputs.require_finished("trained", config.trained)
    whole = inputs.left_model(config.trained)
    require(config.form == "merged" or not whole, "form", config.form,
            f"merged: {config.trained} left a whole model, and no adapter")
    kept = runs.flag(run, "quantisation")
    require(config.form == "adapter" or whole or kept == "none", "form", config.form,
            f"adapter: it was trained beside {kept} weights, and merged into others it is another model")
    model, revision = (str(inputs.model_dir(config.trained)), "") if whole else trained_on(config.trained)[:2]
    below = hugging_face.resolve_model(model, revision or None)
    stored, links = hugging_face.stored_dtype(below), chain.links(config.trained)
    dtype = "float32" if config.form == "adapter" else stored if config.dtype == "checkpoint" else config.dtype
    base = config.base_name or _name(links[0].flags["model"] if whole else model)
    found = Exported(directory.resolve().name, config.form, base, dtype, links, _evaluations(config))
    text = card(found)
    with files.staging(directory) as temporary:
        left = temporary / "left"
        if config.form == "adapter":
            _write_adapter(config, left, below)
        else:
            # Read as it is stored, so that it is rounded once, after the sum; or as float32, which holds all of it.
            read = "float32" if dtype == "float32" else stored
            merged = stage.load_base(model, read, None if whole else config.trained, merge=True, revision=revision)
            stage.forget_backbone()
            of = getattr(jnp, dtype)  # a model of np.dtype would be another
            hugging_face.save_model(merged.model.clone(dtype=of), jax.tree.map(
                lambda leaf: leaf.astype(of), merged.frozen), left, tokenizer_from=below)
        (left / CARD).write_text(text, encoding="utf-8")
        if directory.exists():
            directory.rmdir()
        os.replace(left, directory)
    return directory


def _name(model: str) -> str:
    """A hub id, or the last part of a path: a card is for others, who have no use for this machine's folders."""
    return Path(model).expanduser().resolve().name if is_local(model) else model


def _write_adapter(config: ExportConfig, left: Path, base: Path) -> None:
    folder = inputs.adapter_dir(config.trained)
    left.mkdir()
    shutil.copyfile(folder / WEIGHTS, left / WEIGHTS)
    fields = read_json_object(folder / CONFIG)
    if config.base_name:
        fields |= {"base_model_name_or_path": config.base_name, "revision": None}
    write_json(left / CONFIG, fields)
    for name in hugging_face.TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, left / name)


def _evaluations(config: ExportConfig) -> tuple[Evaluation, ...]:
    """Those that were named, and those in folders beside the run's, of what it left."""
    now = inputs.of_run(config.trained)
    found: dict[Path, Evaluation] = {}
    for folder in config.scores:
        of = runs.read_config(folder)
        require((Path(folder) / RESULTS).is_file(), "scores", folder, f"a finished evaluation, with {RESULTS}")
        if of.get("data", {}).get("inputs", {}).get("trained") != now:
            trained = of["flags"].get("trained") or "a model"
            raise FieldError("scores", f"found {folder!r}, an evaluation of {trained} as it was then, expected one of "
                             f"{config.trained!r} as it is")
        found[Path(folder).resolve()] = _evaluation(folder, of)
    for path in sorted(Path(config.trained).resolve().parent.iterdir()):
        if path in found or not all((path / name).is_file() for name in (runs.CONFIG, RESULTS)):
            continue
        of = runs.read_config(path)
        if of.get("script") == "evaluate" and of.get("data", {}).get("inputs", {}).get("trained") == now:
            found[path] = _evaluation(path, of)
    return tuple(found.values())


def _evaluation(folder: str | Path, config: dict[str, Any]) -> Evaluation:
    return Evaluation(Path(folder).resolve().name, config, read_json(Path(folder) / RESULTS))


def sources_of(config: dict[str, Any]) -> Sequence[tuple[str, str, int, str]]:
    """(what the data is for, its sources, how many examples, their SHA-256), of a run's config.json."""
    data = config.get("data", {})
    rows = []
    for name, digest in data.get("hashes", {}).items():
        accounts = data.get("accounts", {}).get(name, {})
        rows.append((name, ", ".join(accounts), sum(of.get("examples", 0) for of in accounts.values()), digest))
    return rows
