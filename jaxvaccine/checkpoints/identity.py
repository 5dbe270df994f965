"""What a model or an adapter on disk is: SHA-256 of its files' content, by which a run knows again what it was made of.
"""

from pathlib import Path
from typing import Any

from jaxvaccine.checkpoints.content_hash import content_hash
from jaxvaccine.checkpoints.hugging_face import TOKENIZER_FILES, tensor_files
from jaxvaccine.checkpoints.peft import CONFIG, WEIGHTS


def model_identity(directory: Path) -> dict[str, Any]:
    """{"weights", "config", "tokenizer": {file: SHA-256}} of a Hugging Face directory; of a snapshot of the hub also
    its "commit".

    Raises:
      ValueError, FileNotFoundError: weights are missing or of another format, as of `hugging_face.load_model`.
    """
    found: dict[str, Any] = {
        "weights": {path.name: content_hash(path) for path in tensor_files(directory)},
        "config": {"config.json": content_hash(directory / "config.json")},
        "tokenizer": {name: content_hash(directory / name) for name in TOKENIZER_FILES
                      if (directory / name).is_file()}}
    if directory.parent.name == "snapshots":
        found["commit"] = directory.name
    return found


def adapter_identity(peft_dir: Path) -> dict[str, str]:
    """{file: SHA-256} of a PEFT adapter."""
    return {name: content_hash(peft_dir / name) for name in (WEIGHTS, CONFIG)}
