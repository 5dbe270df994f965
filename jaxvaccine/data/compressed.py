"""Compressed files, told by their first bytes, read as a stream."""

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import IO, Any

# By extension: what such a file is called, and how it begins.
NAMES = MappingProxyType({
    ".gz": ("gzip", b"\x1f\x8b"), ".bz2": ("bzip2", b"BZh"), ".xz": ("xz", b"\xfd7zXZ\x00"),
    ".zst": ("Zstandard", b"\x28\xb5\x2f\xfd")})


def is_url(name: str) -> bool:
    return "://" in name


def extension(name: str, packed: bool = False) -> str:
    """The extension of a path, or of the file that a URL means, in lower case: ".jsonl" of "train.JSONL.gz".

    Of a chain such as simplecache::s3://… or zip://…::s3://… the file that is meant is that of the first URL.

    packed: with an extension of a compression, that one: ".gz".
    """
    if is_url(name):
        name = next(link for link in name.split("::") if is_url(link)).partition("?")[0]
    path = PurePosixPath(name)
    return (path.with_suffix("") if not packed and path.suffix.lower() in NAMES else path).suffix.lower()


def decompressed(opened: IO[bytes], name: str) -> IO[bytes]:
    """The file's bytes as a stream, decompressed if they are compressed, whatever its name.

    Raises:
      ValueError: its name has the extension of a compression that its bytes do not have, or it is of Zstandard and
        nothing here reads that. Reading the stream raises it where the bytes are damaged.
    """
    stream = io.BufferedReader(opened) if not hasattr(opened, "peek") else opened
    begins = stream.peek(8)[:8]
    expected = extension(name, packed=True)
    found = next((key for key, (_, magic) in NAMES.items() if begins.startswith(magic)), None)
    if expected in NAMES and found != expected:
        raise ValueError(f"{name}: found {begins!r} at its start, expected a {NAMES[expected][0]} file")
    if found is None:
        return stream
    return io.BufferedReader(_Checked(_open(stream, found, name), name, NAMES[found][0]), 1 << 16)


def _open(stream: IO[bytes], packing: str, name: str) -> IO[bytes]:
    if packing == ".zst":
        return _open_zstandard(stream, name)
    return {".gz": gzip.open, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}[packing](stream)


def _open_zstandard(stream: IO[bytes], name: str) -> IO[bytes]:
    module = _module("compression.zstd") or _module("backports.zstd")  # Python 3.14 has the former
    if module:
        return module.ZstdFile(stream)
    if module := _module("zstandard"):
        return _Frames(stream, module.ZstdDecompressor())
    raise ValueError(f"{name}: found a Zstandard file and nothing to read it with, expected the package zstandard: "
                     "pip install 'jaxvaccine[zstd]'")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class _Frames(io.RawIOBase):
    """Frame after frame, by the package zstandard, whose own reader takes a file that breaks off for a whole one."""

    def __init__(self, stream: IO[bytes], decompressor: Any):
        self.stream, self.decompressor, self.frame, self.waiting = stream, decompressor, None, b""

    def read(self, size: int = -1) -> bytes:
        del size  # what a piece of the file gives: `_Checked` keeps what is more than it was asked for
        while True:
            piece = self.waiting or self.stream.read(1 << 16)
            if not piece:
                if self.frame is not None:
                    raise EOFError("it ends within a frame")
                return b""
            if self.frame is None:
                self.frame = self.decompressor.decompressobj()
            found, self.waiting = self.frame.decompress(piece), b""
            if self.frame.eof:
                self.waiting, self.frame = self.frame.unused_data, None
            if found:
                return found


class _Checked(io.RawIOBase):
    """A stream whose damage is a ValueError that names the file."""

    def __init__(self, stream: IO[bytes], name: str, kind: str):
        self.stream, self.name, self.kind, self.left = stream, name, kind, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.left:
            self.left = memoryview(self._piece(len(buffer)))
        data, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def _piece(self, size: int) -> bytes:
        try:
            return self.stream.read(size)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
            raise ValueError(f"{self.name}: found a damaged {self.kind} file ({e}), expected a whole one") from e
        except Exception as e:  # Zstandard's packages have their own
            if "zst" not in type(e).__module__:
                raise
            raise ValueError(f"{self.name}: found a damaged {self.kind} file ({e}), expected a whole one") from e

    def close(self) -> None:
        self.stream.close()
        super().close()
