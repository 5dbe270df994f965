"""From what a person calls a model to its Hugging Face directory."""

import os
import re
from pathlib import Path

from jaxvaccine import world
from jaxvaccine.checkpoints.gguf import convert_cached

HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja")


def resolve_model(path_or_hub_id: str | os.PathLike, revision: str | None = None) -> Path:
    """The directory of a model: a local one, a GGUF file's conversion (made once, cached by content), or a download.

    "world" is the small model that comes with the package, unless there is a folder of that name.

    Args:
      path_or_hub_id: of the model.
      revision: branch, tag or commit of a model on the hub; its main branch unless given.

    Raises:
      FileNotFoundError: something that looks like a path is not there; the hub is not asked.
      ValueError: a directory without config.json, another kind of file, a hub id that cannot be downloaded, or a
        revision of what is not on the hub.
    """
    directory = _local(path_or_hub_id)
    if directory is None:
        return _download(os.fspath(path_or_hub_id), revision)
    if revision:
        raise ValueError(f"{path_or_hub_id}: found revision {revision!r}, expected none: it is no model of the hub")
    return directory


def loadable_name(path_or_hub_id: str | os.PathLike) -> str:
    """What transformers and PEFT load the same model by: its hub id, or the absolute path of its directory."""
    directory = _local(path_or_hub_id)
    return os.fspath(path_or_hub_id) if directory is None else str(directory.resolve())


def is_local(path_or_hub_id: str | os.PathLike) -> bool:
    """Whether a model is here, and not on the hub. Raises as `resolve_model`."""
    return _local(path_or_hub_id) is not None


def _local(path_or_hub_id: str | os.PathLike) -> Path | None:
    """The directory, or None for what can only be a hub id."""
    path_or_hub_id = world.replace_name(path_or_hub_id)
    name = os.fspath(path_or_hub_id)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path}: found no config.json, expected a Hugging Face model directory "
                             "(a GGUF file is named itself, not its folder)")
        return path
    if path.exists():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{path}: found a file, expected a model directory, a .gguf file or a hub id")
        return convert_cached(path)
    # 'runs/mistyped' has the form of a hub id; a folder `runs` here tells that a path was meant.
    if (not isinstance(path_or_hub_id, str) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
            or path.suffix.lower() in (".gguf", ".safetensors", ".bin") or ("/" in name and path.parent.is_dir())):
        raise FileNotFoundError(f"{path}: found no such file or directory, expected a model directory, a .gguf file "
                                "or a hub id (owner/name)")
    return None


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=["original/*", "consolidated*"]))
    except Exception as e:  # the client raises a dozen unrelated types, for the network, the hub and the repository
        of = f" (revision {revision!r})" if revision else ""
        raise ValueError(f"{name}{of}: found neither a local directory nor a model that the hub gives out "
                         f"({type(e).__name__}: {e})") from e
