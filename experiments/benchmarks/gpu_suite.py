"""Everything that a GPU has to say, in one command, without a network: steps and generation beside PyTorch's, TFLOP/s,
memory against its prediction, cuDNN's attention against XLA's.

  python -m experiments.benchmarks.gpu_suite --run_dir=runs/gpu

Goes on for --minutes and says what is left; the same command again continues. Each part runs in a process of its own,
with an allocator that is capped at --memory_gb. A part that fails is recorded with what it says, and the others go on.
Weights are random. Needs torch and peft (the `parity` extra), both for CUDA, and JAX's CUDA plugin.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from experiments.benchmarks.gpu_parts import SuitePart, part_names
from experiments.benchmarks.gpu_report import report
from jaxvaccine import cli
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.config import Part, field, flat, make, require
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.report.tables import REPORT

RESULTS = "results.jsonl"
LEAST = 0.25  # of --minutes: with less left no part is begun


@dataclasses.dataclass(frozen=True)
class RunPart(Part):
    """Run."""

    run_dir: str = field("", "Folder of the results.")
    overwrite: bool = field(False, "Delete earlier results in --run_dir and start again.")
    part: tuple[str, ...] = field(("all",), "Which parts: all, names such as step:sft:ours, or their beginnings, such "
                                  "as step or generation.")
    minutes: float = field(8.0, "How long this call may take.", above=0)
    retry: bool = field(False, "Measure parts again that failed.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """GPU suite."""

    measured: SuitePart = dataclasses.field(default_factory=SuitePart)
    run: RunPart = dataclasses.field(default_factory=RunPart)

    def chosen(self) -> list[str]:
        """Names of the parts to measure.

        Raises:
          FieldError: no part has such a name.
        """
        names = part_names(self.measured)
        for asked in self.run.part:
            require(asked == "all" or any(_matches(name, asked) for name in names), "part", asked,
                    "all, or the beginning of one of " + ", ".join(names))
        return [name for name in names if any(asked == "all" or _matches(name, asked) for asked in self.run.part)]


def _matches(name: str, asked: str) -> bool:
    return name == asked or name.startswith(asked + ":")


def read_results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """{part: its last line}; a line that a kill cut off is none."""
    found = {}
    path = run_dir / RESULTS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[value["part"]] = value
    return found


def _append(run_dir: Path, value: Mapping[str, Any]) -> None:
    # On a line of its own, even if a kill cut the last one off.
    path = run_dir / RESULTS
    whole = not path.is_file() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def card_bytes() -> int:
    """Memory of the first NVIDIA card that is visible.

    Raises:
      ValueError: there is none.
    """
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        text = subprocess.run(["nvidia-smi", f"--id={visible}", "--query-gpu=memory.total",
                               "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True).stdout
        return int(text.splitlines()[0]) * 2**20
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise ValueError(f"--device=gpu: found no NVIDIA card ({error}), expected nvidia-smi to list one; "
                         "--device=cpu shows that the suite works") from error


def environment(name: str, part: SuitePart, card: int | None) -> dict[str, str]:
    """Of a part's process. Only ours has JAX on the card; there its allocator takes its cap at once, and no more.

    card: bytes that it has, None on a CPU.
    """
    ours = name == "attention" or name.endswith("ours") or (name.startswith("prediction") and not part.card)
    if card is None or not ours:
        return {"JAX_PLATFORMS": "cpu"}
    fraction = min(0.95, part.memory_gb * 1e9 / card)
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.4f}"}


def in_process(name: str, part: SuitePart, earlier: Mapping[str, Any], more: Mapping[str, str], seconds: float,
               log: Path) -> dict[str, Any]:
    """`gpu_parts.measured` in a process of its own; what it says goes to the log.

    Raises:
      subprocess.TimeoutExpired: it was ended after so many seconds.
    """
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as file:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(request, {"name": name, "values": flat(part), "earlier": earlier})
        done = subprocess.run(
            [sys.executable, "-m", "experiments.benchmarks.gpu_parts", str(request), str(answer)], stdout=file,
            stderr=subprocess.STDOUT, env={**os.environ, **more}, timeout=seconds, check=False)
        if answer.is_file():
            return read_json(answer)
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return {"failed": f"exit status {done.returncode}: {' '.join(said[-3:])[-500:]}"}


def carry_out(config: SuiteConfig) -> list[str]:
    """Measures what is missing, for as long as this call may take; returns the names of what is left."""
    part, run, began = config.measured, config.run, time.monotonic()
    chosen = config.chosen()
    card = card_bytes() if part.device == "gpu" else None
    settings = json.loads(json.dumps(flat(part)))
    run_dir = runs.open_run(run.run_dir, "gpu_suite", settings, {}, flat(run), run.overwrite)
    (run_dir / "logs").mkdir(exist_ok=True)
    results = read_results(run_dir)
    left = [name for name in chosen if name not in results or (run.retry and "failed" in results[name])]
    limit = 60 * run.minutes
    while left:
        started = time.monotonic()
        seconds = limit - (started - began)
        if seconds < LEAST * limit:
            break
        name = left[0]
        print(f"{name} …", file=sys.stderr, flush=True)
        earlier = {other: value["figures"] for other, value in results.items() if "figures" in value}
        try:
            found = in_process(name, part, earlier, environment(name, part, card), seconds,
                               run_dir / "logs" / f"{name.replace(':', '-')}.log")
        except subprocess.TimeoutExpired:
            if seconds < 0.9 * limit:
                break  # it has all of the next call
            found = {"failed": f"not done after {seconds:.0f} s"}
        results[name] = {"part": name, "took": round(time.monotonic() - started, 1), **found}
        _append(run_dir, results[name])
        print(f"{name}: {found.get('failed', 'measured')}", file=sys.stderr, flush=True)
        left.pop(0)
    text = report(part, results)
    (run_dir / REPORT).write_text(text, encoding="utf-8")
    print(text)
    return left


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        left = carry_out(make(SuiteConfig, cli.given(cli.Section(SuiteConfig), values)))
    if left:
        print(f"{len(left)} parts are left ({', '.join(left)}): the same command again goes on with them.")


VERB = cli.Verb(__doc__, (cli.Section(SuiteConfig),), call)

if __name__ == "__main__":
    cli.call("gpu_suite", VERB)
