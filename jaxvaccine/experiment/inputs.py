"""What a run was made of: the SHA-256 of every input's content, recorded in its config.json and compared wherever the
run is continued or read by another.

`data.inputs` of a config.json has the model's files, and of the run that it builds on the adapter's files and its
config; `results` has the same of what the run itself left."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.checkpoints.identity import adapter_identity, model_identity
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.json_files import write_json

# What runs leave: the adapter of the model as it comes, and, of an attack that trained a new adapter on merged weights,
# that one; or, of an attack whose result is no adapter, the whole model.
ADAPTER, TRAINED, MODEL = "adapter", "trained_adapter", "model"


def adapter_dir(run_dir: str | Path) -> Path:
    """The adapter that turns the model as it comes into what the run left, for PEFT to load."""
    return Path(run_dir) / ADAPTER


def model_dir(run_dir: str | Path) -> Path:
    """The whole model that a run left in the place of an adapter, a Hugging Face directory."""
    return Path(run_dir) / MODEL


def left_model(run_dir: str | Path) -> bool:
    return model_dir(run_dir).is_dir()


def is_finished(run_dir: str | Path) -> bool:
    return adapter_dir(run_dir).is_dir() or left_model(run_dir)


def of_model(model: str, revision: str = "") -> dict[str, Any]:
    """`model_identity` of a directory, hub id or GGUF file."""
    return model_identity(hugging_face.resolve_model(model, revision or None))


def of_adapters(run_dir: str | Path) -> dict[str, dict[str, str]]:
    """{folder: {file: SHA-256}} of the adapters that a run left."""
    folders = [Path(run_dir) / name for name in (ADAPTER, TRAINED)]
    return {folder.name: adapter_identity(folder) for folder in folders if folder.is_dir()}


def of_run(run_dir: str | Path) -> dict[str, Any]:
    """What another run reads of a finished one: its adapters or its model, and its config without what changes no
    result."""
    model = {MODEL: model_identity(model_dir(run_dir))} if left_model(run_dir) else {}
    return {**of_adapters(run_dir), **model, "config": _hash(runs.read_config(run_dir))}


def _hash(config: Mapping[str, Any]) -> str:
    settled = {name: config.get(name) for name in ("script", "flags", "data")}
    return hashlib.sha256(json.dumps(settled, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def record_results(run_dir: Path, steps: int, left: Mapping[str, Mapping[str, Any]], **more: Any) -> None:
    """Writes into a run's config.json how many steps it took, the hashes of what it is about to leave, and `more`."""
    config = runs.read_config(run_dir)
    write_json(run_dir / runs.CONFIG, {
        **config, **more, "steps": steps, "results": {**left, "config": _hash(config)}})


def require_finished(name: str, run_dir: str) -> dict[str, Any]:
    """The config.json of a finished run, which the field `name` names, whose inputs and results are still those that
    it recorded; so are those of the run that it builds on.

    Raises:
      FileNotFoundError: there is no such run.
      FieldError: it has not finished; or the model, the adapter or the run below has changed since: each file that
        differs is named, with both hashes.
    """
    config = runs.read_config(run_dir)
    if not is_finished(run_dir):
        raise FieldError(name, f"found {run_dir!r}, a run that has not finished; re-run its command first")
    recorded, flags = config.get("data", {}).get("inputs"), config["flags"]
    if recorded is None or "results" not in config:
        raise FieldError(name, f"found {run_dir!r}, a run without the hashes of its inputs and results, expected one "
                               "of this version: re-run its command with --overwrite")
    now = {"model": of_model(flags["model"], flags.get("revision", ""))}
    if below := runs.below(flags):
        require_finished(name, below)
        now["aligned" if flags.get("aligned") else "start"] = of_run(below)
    differences = runs.differences({"inputs": recorded, "results": config["results"]},
                                   {"inputs": now, "results": of_run(run_dir)}, "recorded", "there is")
    if differences:
        raise FieldError(name, f"found {run_dir!r}, a run that has changed since it ended, or what it was made of has; "
                               "expected what it recorded, or --overwrite to run it again: " + "; ".join(differences))
    return config
