"""SHA-256 of what a file holds, remembered for large ones."""

import contextlib
import hashlib
import os
import re
import time
from pathlib import Path

from jaxvaccine.checkpoints import files
from jaxvaccine.json_files import read_json, write_json

# What is smaller is read again each time.
_WORTH_CACHING = 2**20  # bytes
# A file may be written again within its clock's resolution: one that has just been written is not remembered.
_SETTLED = 2.0  # seconds


def content_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, 64 hex digits.

    Large files' are remembered in the cache directory, by path, size, inode and the times of the last change of content
    and of metadata; the latter no program can set back.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path = Path(path).absolute()
    now, found = time.time(), path.stat()
    state = [found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
    remembered = files.cache_directory() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        entry = read_json(remembered)
        if entry["state"] == state and re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            return entry["sha256"]
    with open(path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    settled = max(found.st_mtime, found.st_ctime) < now - _SETTLED
    if found.st_size >= _WORTH_CACHING and settled:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_json(remembered, {"path": str(path), "state": state, "sha256": digest})
    return digest
