"""A run is a folder: its config, metrics, checkpoints, adapter, and what a person looks at.

Re-running the same command continues it; the same folder with other flags or other data is an error.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxvaccine.data.prompts import Example
from jaxvaccine.json_files import read_json, write_json

CONFIG = "config.json"
# Flags, and counts of accounts, that earlier versions did not have, and what their runs were made with.
BEFORE = {"quantisation": "none", "optimizer": "adamw", "objective": "plain", "order": "mixed", "user_rows": "drawn",
          "trains": "adapter", "ablate": "none", "other_category": 0, "start": "", "adapter": "new", "supervise": "all",
          "stop": [], "bad_rows": "error", "answers": "", "labelled": [], "judge_template": "chat",
          "judge_guideline": "", "judge_reading": "reply", "judge_reply": "auto", "judge_max_new_tokens": 32,
          "judge_least_mass": 0.5}
PACKAGES = ("jaxvaccine", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")


def read_config(run_dir: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a run.

    Raises:
      FileNotFoundError: no such folder, or it has no config.json.
      ValueError: config.json is not a JSON object.
    """
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected the folder of a run (written by align or finetune)")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: found a JSON {type(config).__name__}, expected an object")
    return config


def flag(config: Mapping[str, Any], name: str) -> Any:
    """A flag of a run; of one from before there was such a flag, what it was made with."""
    return config["flags"].get(name, BEFORE.get(name))


def below(flags: Mapping[str, Any]) -> str:
    """The folder of the run that one with these flags starts from; "" of one that starts from a model as it comes."""
    return flags.get("aligned") or flags.get("start") or ""


def examples_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the examples in their order, 64 hex digits."""
    lines = (json.dumps([*example, *([example.history] if example.history else [])], ensure_ascii=True)
             for example in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_run(
    run_dir: str | os.PathLike,
    script: str,
    flags: Mapping[str, Any],
    data: Mapping[str, Any],
    operational: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    changeable: Collection[str] = (),
    write: bool = True,
) -> Path:
    """Makes the folder and its config.json, or returns to it if it was made with the same flags and data.

    Args:
      run_dir: the folder.
      script: which script runs.
      flags: what determines the result; JSON values.
      data: hashes and fingerprints of what it reads; JSON values.
      operational: flags that do not change the result, recorded and not compared.
      overwrite: deletes an earlier run in that folder first.
      changeable: flags that may differ from those of the run in the folder, and are then recorded anew.
      write: False compares, and neither writes nor deletes anything.

    Raises:
      FileExistsError: the folder holds a run with other flags or data (each named, found and expected), or holds files
        and is no run.
    """
    run_dir = Path(run_dir)
    config = json.loads(json.dumps({
        "script": script, "flags": flags, "data": data, "operational": operational or {}, "versions": _versions(),
        "git_commit": _git_commit()}))
    # A kill while config.json was first written leaves its temporary file and nothing else: still an empty folder.
    if run_dir.is_dir() and any(path.name != CONFIG + ".tmp" for path in run_dir.iterdir()):
        if not (run_dir / CONFIG).is_file():
            raise FileExistsError(f"{run_dir}: found files but no {CONFIG}, expected a run or an empty folder")
        if overwrite and write:
            # Renamed first: a run that is half deleted would be taken for somebody's files.
            deleted = run_dir.with_name(run_dir.name + ".deleted")
            shutil.rmtree(deleted, ignore_errors=True)
            os.replace(run_dir, deleted)
            shutil.rmtree(deleted)
        elif not overwrite:
            earlier = read_config(run_dir)
            _compare(run_dir, earlier, config, changeable)
            if write and any(earlier["flags"].get(name) != config["flags"].get(name) for name in changeable):
                write_json(run_dir / CONFIG, {**earlier, "flags": config["flags"]})
            return run_dir
    if write:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / CONFIG, config)
    return run_dir


def _compare(run_dir: Path, found: Mapping[str, Any], expected: Mapping[str, Any], changeable: Collection[str]) -> None:
    def compared(config):
        flags, data = _leaves(config.get("flags"), ""), _leaves(config.get("data"), "data")
        flags = {name: value for name, value in flags.items() if name not in changeable}
        # Counts on the way to the examples, whose hashes are compared.
        data = {name: value for name, value in data.items() if not name.startswith(("data.accounts", "data.shared"))}
        return {"script": config.get("script"), **flags, **data}

    old, new = compared(found), compared(expected)
    before = {name: BEFORE[of] for name in {*old, *new} if (of := name.rpartition(".")[2]) in BEFORE}
    if found_differences := differences({**before, **old}, {**before, **new}, "found", "expected"):
        raise FileExistsError(
            f"{run_dir}: holds a run with other flags or data; choose another folder, or --overwrite to delete it. "
            + "; ".join(found_differences))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], of_old: str, of_new: str) -> list[str]:
    """"a.b: {of_old} 1, {of_new} 2" for every value in nested mappings that differs, or is in one of them alone."""
    before, after = _leaves(old, ""), _leaves(new, "")
    return [f"{name}: {of_old} {_short(before.get(name))}, {of_new} {_short(after.get(name))}"
            for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def _leaves(value: Any, name: str) -> dict[str, Any]:
    """{dotted name: value} of what nested objects hold, so that a difference is named by itself."""
    if not isinstance(value, dict):
        return {name: value}
    return {leaf: v for key, child in value.items()
            for leaf, v in _leaves(child, f"{name}.{key}".lstrip(".")).items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:60] + f"… ({len(text)} characters)"


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git_commit() -> str | None:
    """The commit of the checkout this package lies in, with "+changes" if it has uncommitted ones; else None."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], check=True, capture_output=True,
                              text=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
