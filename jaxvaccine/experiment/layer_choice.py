"""Which layers an attack trains: numbers, or those that the alignment, with T-Vaccine, never or rarely had active.

An attacker who knows the defense looks for what it left as it was. How often a layer was active is read from the
aligned run, which has recorded `active_layers` of every step.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxvaccine.experiment.config import FieldError, require
from jaxvaccine.experiment.methods import AlignmentMethod, TVaccine, uses

FIELD = "only_layers"
FROZEN, RAREST = "frozen", "rarest"
ACTIVE_LAYERS = "active_layers"  # among a step's metrics, [L] bool
ACTIVE_STEPS = "active_steps"  # in an aligned cell's file, [L] int: how many steps each layer was active
T_VACCINES = "numbers: only T-Vaccine's alignment has layers active or frozen"


def check_text(layers: Sequence[str]) -> None:
    """Raises FieldError unless these are numbers, or "frozen" or "rarest:N" by itself."""
    numbers = bool(layers) and all(text.isdecimal() for text in layers)
    require(numbers or (len(layers) == 1 and re.fullmatch(rf"{FROZEN}|{RAREST}:0*[1-9]\d*", layers[0]) is not None),
            FIELD, layers, f"numbers of at least 0, or {FROZEN}, or {RAREST}:N, N at least 1")


def of_alignment(layers: Sequence[str] | None) -> bool:
    """Whether the alignment says which layers these are."""
    return layers is not None and not layers[0].isdecimal()


def _rarest(layers: Sequence[str]) -> int:
    """N of rarest:N; 0 of frozen."""
    return int(layers[0].partition(":")[2] or 0)


def check(layers: Sequence[str] | None, num_layers: int, method: AlignmentMethod) -> None:
    """What can be said before the alignment: raises FieldError for layers that the model lacks or that no alignment
    with this method leaves."""
    t_vaccine = uses(method, TVaccine)
    # What no draw changes is found with any: here that of an alignment which drew nothing.
    mask(layers, num_layers, None if t_vaccine is None else np.zeros(num_layers, int))
    if not of_alignment(layers):
        return
    require(bool(_rarest(layers)) or t_vaccine.layers < num_layers, FIELD, layers,
            f"{RAREST}:N or numbers: the alignment has all {num_layers} layers active")


def mask(layers: Sequence[str] | None, num_layers: int, active_steps: np.ndarray | None = None) -> np.ndarray | None:
    """[L] bool, true where a layer trains; None for all.

    Args:
      layers: of --only_layers.
      num_layers: L.
      active_steps: [L], in how many steps of the alignment each layer was active; None if it has recorded none.

    Raises:
      FieldError: a layer that the model lacks; the alignment has recorded nothing; or all layers were active at times,
        where those that never were are asked for.
    """
    if layers is None:
        return None
    if not of_alignment(layers):
        numbers = [int(text) for text in layers]
        require(max(numbers) < num_layers, FIELD, layers, f"numbers below {num_layers}, the model's number of layers")
        return np.isin(np.arange(num_layers), numbers)
    require(active_steps is not None, FIELD, layers, T_VACCINES)
    count = _rarest(layers)
    require(count <= num_layers, FIELD, layers, f"at most {RAREST}:{num_layers}, all of the model's layers")
    if count:
        # Stable: of layers that were active equally often, the first.
        return np.isin(np.arange(num_layers), np.argsort(active_steps, kind="stable")[:count])
    require(bool((active_steps == 0).any()), FIELD, layers, f"{RAREST}:N or numbers: no layer was frozen in every step "
            f"of the alignment; they were active in {', '.join(map(str, active_steps))} steps")
    return active_steps == 0


def numbers(mask: np.ndarray) -> list[int]:
    """Of the layers that train, as a run records them."""
    return np.flatnonzero(mask).tolist()


def count_active(active_layers: Sequence[Sequence[bool]]) -> np.ndarray:
    """[L] int of the metric [steps, L]."""
    return np.asarray(active_layers).astype(int).sum(axis=0)


def active_steps_of_run(run_dir: str | Path, steps: int) -> np.ndarray | None:
    """[L] int, in how many steps of a finished alignment each layer was active; None if it has recorded none.

    Raises:
      FieldError: its metrics.jsonl does not have all of its steps.
    """
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if len(lines) != steps:
        raise FieldError(FIELD, f"found {len(lines)} steps in {path}, expected the alignment's {steps}")
    found = [entry[ACTIVE_LAYERS] for line in lines if ACTIVE_LAYERS in (entry := json.loads(line))]
    return count_active(found) if found else None
