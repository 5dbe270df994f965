"""Files on disk: safetensors with errors that say what is wrong where, directories written all or nothing."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxvaccine.json_files import write_json

FLOATS = ("F64", "F32", "F16", "BF16")
MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """Where a tensor lies and what its header says; dtype is safetensors' name, e.g. BF16."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


class NewTensor(NamedTuple):
    """A tensor to be written: its size, and how to get its values once its shard's turn has come."""

    name: str
    num_bytes: int
    read: Callable[[], np.ndarray]


def cache_directory() -> Path:
    """Where converted models are kept: $JAXVACCINE_CACHE, else ~/.cache/jaxvaccine."""
    return Path(os.environ.get("JAXVACCINE_CACHE") or "~/.cache/jaxvaccine").expanduser()


def _share(path: Path, mode: int) -> None:
    """Gives a temporary file or directory, private at first, the mode that open or mkdir would have given it."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(mode & ~umask)


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A temporary directory beside `directory`, so on the same file system: it can be renamed. Removed at the end."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    _share(temporary, 0o777)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing_model(directory: Path) -> None:
    """Raises FileExistsError unless a model can be written there without losing one."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory}: found a file, expected a directory or nothing")
    for pattern in ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"):
        for path in directory.glob(pattern):
            raise FileExistsError(f"{directory}: found a model ({path.name}), expected a directory without one: "
                                  "nothing is overwritten")


def publish(temporary: Path, directory: Path, config: str) -> None:
    """Moves staged files into place: a new directory appears whole, by one rename.

    Into a directory that holds other files they go one by one. There the config file, without which nothing of it is
    read, goes away first and comes back last.
    """
    if not directory.exists() or not any(directory.iterdir()):
        os.replace(temporary, directory)
        return
    (directory / config).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == config):
        os.replace(path, directory / path.name)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """What safetensors files hold, by tensor name. Reads headers only.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated or no safetensors file, or two files hold the same tensor.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: found no such file")
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in found:
                        raise ValueError(f"{file}: tensor {name!r}: found also in {found[name].file.name}")
                    stored = opened.get_slice(name)
                    found[name] = StoredTensor(file, name, stored.get_dtype(), tuple(stored.get_shape()))
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{file}: found {_describe_damage(file)}, expected a safetensors file ({e})") from e
    return found


def _describe_damage(file: Path) -> str:
    """Which tensor is not whole, of how many bytes; safetensors' own errors say only that the file is incomplete."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > 100_000_000:
            return f"{size} bytes without a header"
        if size < 8 + length:
            return f"{size} bytes, truncated within its header of {length} bytes"
        try:
            header = json.loads(opened.read(length))
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
            expected = 8 + length + max(ends.values())
            missing = sorted(name for name, end in ends.items() if 8 + length + end > size)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "an unreadable header"
    if missing:
        return f"{size} bytes of {expected}, truncated: tensor {missing[0]!r} (of {len(missing)}) is not whole"
    return f"{size} bytes where the header describes {expected}"


def check_tensors(found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Raises ValueError unless the names are those expected, every shape too, and every dtype is a float of FLOATS.

    Args:
      found: as of `read_headers`, without what may be ignored.
      expected: shape by name.
      source: the file or directory that is named when a tensor is missing.
    """
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{source}: tensor {name!r}: missing, expected shape {list(shape)}")
            continue
        tensor = found[name]
        if tensor.shape != shape:
            problems.append(f"{tensor.file}: tensor {name!r}: found shape {list(tensor.shape)}, "
                            f"expected {list(shape)}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{tensor.file}: tensor {name!r}: found dtype {tensor.dtype}, "
                            f"expected one of {', '.join(FLOATS)}")
    problems += [f"{tensor.file}: tensor {name!r}: found shape {list(tensor.shape)}, expected no such tensor"
                 for name, tensor in found.items() if name not in expected]
    if problems:
        more = f" (and {len(problems) - 1} more such errors)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)


def read_rows(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """A copy of rows start to stop. The file is mapped for this call only: mapped pages count as resident memory."""
    from safetensors import safe_open

    with safe_open(tensor.file, framework="numpy") as opened:
        return opened.get_slice(tensor.name)[start:tensor.shape[0] if stop is None else stop]


def write_shards(directory: Path, tensors: Iterable[NewTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes model.safetensors, or numbered shards and their index. Holds one shard in memory at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name, get_storage_size=lambda tensor: tensor.num_bytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        # safetensors writes the buffer as it lies: a transposed view must become a copy first.
        values = {name: np.ascontiguousarray(by_name[name].read()) for name in names}
        save_file(values, directory / file, metadata={"format": "pt"})
        _share(directory / file, 0o666)
        del values
    if split.is_sharded:
        write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
