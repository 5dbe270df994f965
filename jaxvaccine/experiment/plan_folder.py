"""The folder of a plan: <backbone>/<method>/seed<k>/aligned/ with the aligned adapter, beside it aligned.json and
<attack>.json, a file a cell with its rows of the table of results, and at the top results.csv with all rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvaccine.checkpoints.identity import adapter_identity
from jaxvaccine.experiment import inputs, lanes, results, runs
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.checks import MadeOf
from jaxvaccine.experiment.plans import (
    ALIGNED,
    AS_IT_COMES,
    Plan,
    Settings,
    align_folder,
    attack_folder,
    folder_name,
)
from jaxvaccine.experiment.results import Cell, Row
from jaxvaccine.json_files import read_json, read_json_object, write_json

Measure = Callable[[int, lanes.Lanes], Mapping[str, np.ndarray]]


class Probes(NamedTuple):
    """What a study measures of lanes on the way, beside scores: (step, lanes) -> {measure: [N] or [N, L]}.

    alignment: (config, tokenizer, seeds) -> such a measure, taken after every `every` steps and at both ends.
    attack: the same of an attack, taken where a model is scored.
    check: (alignment, attack) of every cell, before the first is carried out; raises for what can't be measured.
    """

    alignment: Callable[[AlignConfig, Any, Sequence[int]], Measure] | None = None
    attack: Callable[[AlignConfig, AttackConfig, Any, Sequence[int]], Measure] | None = None
    every: int = 0
    check: Callable[[AlignConfig, AttackConfig | None], None] = lambda aligned, attacked: None


class Context(NamedTuple):
    """What is the same for all cells."""

    plan: Plan
    settings: Settings
    root: Path
    made_of: Mapping[Cell, MadeOf]
    probes: Probes
    written: Callable[[Path], None]  # called with every folder that has something new to report
    say: Callable[[str], None]


def collect(root: Path, plan: Plan) -> None:
    """Writes the table of all cells of the plan that are there."""
    rows: list[Row] = []
    for backbone in plan.backbones:
        paths = [result_path(root, Cell(backbone, AS_IT_COMES, "", 0))]
        for method in plan.methods:
            for seed in plan.seeds:
                cells = [Cell(backbone, method, text, seed) for text in ("", *plan.of_method(method))]
                paths += [result_path(root, cell) for cell in cells]
        rows += [row for path in paths if path.exists() for row in read_json(path)["rows"]]
    results.write(root / results.TABLE, results.table(rows))


def result_path(root: Path, cell: Cell) -> Path:
    """Of a cell's rows; of the aligned model's, if the cell's attack is ""."""
    folder = attack_folder(root, cell)
    if cell.method == AS_IT_COMES:
        return root / folder_name(cell.backbone) / f"{AS_IT_COMES}.json"
    return folder / f"{ALIGNED}.json" if not cell.attack else folder.with_name(f"{folder.name}.json")


def check_same(root: Path, cell: Cell, made_of: MadeOf) -> None:
    """Raises FileExistsError if a cell's result, if it is there, is that of other inputs, or its adapter another."""
    path = result_path(root, cell)
    if not path.exists():
        return
    found, now = read_json_object(path), {"inputs": made_of}
    if "adapter" in found:
        now["adapter"] = adapter_identity(inputs.adapter_dir(align_folder(root, cell)))
    if changed := runs.differences({name: found.get(name) for name in now}, now, "found", "expected"):
        raise FileExistsError(f"{path}: holds a result of other inputs than there are now; choose another folder, or "
                              "--overwrite to delete it. " + "; ".join(changed))


def finish(context: Context, cell: Cell, rows: Sequence[Row], answers: Mapping[str, Any] | None = None, **more: Any
            ) -> None:
    """Writes a cell's file. more: the accounts of what the run and the tests read, and what of it is shared."""
    path = result_path(context.root, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"rows": list(rows), "answers": answers or {}, "inputs": context.made_of[cell], **more})
    collect(context.root, context.plan)


def say_scores(context: Context, cells: Sequence[Cell]) -> None:
    scores: dict[str, list[str]] = {}
    for cell in cells:
        rows = read_json(result_path(context.root, cell))["rows"]
        last = max(row["step"] for row in rows)
        for row in rows:
            if row["step"] == last and row.get("layer") is None:
                scores.setdefault(row["measure"], []).append(f"{row['value']:.4g}")
    context.written(context.root)
    seeds = ",".join(str(cell.seed) for cell in cells)
    context.say(f"{cells[0].backbone} {cells[0].method} {cells[0].attack}, seed {seeds}: "
                + "; ".join(f"{measure} {', '.join(values)}" for measure, values in scores.items()))
