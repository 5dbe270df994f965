"""The one table of results that all reports read: a row for every measured number.

| column | |
|---|---|
| backbone, method, attack | of the plan's cell, as written there; attack "" before there is any, method "none" for the
backbone as it comes |
| seed | of alignment and attack |
| stage | "backbone", "alignment" or "attack" |
| step | steps done in that stage |
| measure | harmful_score (not_refused of a judge of phrases), with it harmful_score_plus, no_answer and unread, and
where a plan asks for it harmful_score:NAME of every kind of harm;
over_refusal, sst2, … in percent; harmful_loss in nats a token; budget, the learning rate times LoRA scale summed over
the stage's steps so far (budget.py); and what a study measures |
| layer | of measures by layer, else empty |
| value | |
| n, low, high | how many prompts, and the 95% interval of this one number over them, else empty |

The scores of an aligned model stand at its alignment's last step. An attack has rows from its first step on: before it,
the model is the aligned one.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxvaccine.evaluation.rates import percent, wilson_interval
from jaxvaccine.evaluation.tasks import HARMFUL_SCORE, PHRASES_SCORE
from jaxvaccine.experiment.evaluate_config import LOSS

if TYPE_CHECKING:
    import pandas as pd

TABLE = "results.csv"
BUDGET = "budget"
HS_PLUS = f"{HARMFUL_SCORE}_plus"
COLUMNS = ("backbone", "method", "attack", "seed", "stage", "step", "measure", "layer", "value", "n", "low", "high")

Row = dict[str, Any]


class Cell(NamedTuple):
    """One combination of a plan."""

    backbone: str
    method: str
    attack: str
    seed: int


def score_rows(cell: Cell, stage: str, step: int, results: Mapping[str, Mapping[str, Any]], by_category: bool = False
               ) -> list[Row]:
    """Rows of what `evaluate` returns. by_category: those of every kind or sort too, "harmful_score:privacy"."""
    rows = []
    for task, result in results.items():
        row = {**cell._asdict(), "stage": stage, "step": step, "measure": task}
        if task == LOSS:
            rows.append({**row, "value": result["loss"], "n": result["n"]})
        else:
            low, high = result["interval"]
            rows.append({**row, "value": result["score"], "n": result["n"], "low": low, "high": high})
        if "plus" in result:
            low, high = result["plus_interval"]
            plus = {"measure": HS_PLUS, "value": result["plus"], "n": result["n"], "low": low, "high": high}
            rows.append({**row, **plus})
        for name, of in result.get("categories", {}).items() if by_category else ():
            low, high = of["interval"]
            rows.append({**row, "measure": f"{task}:{name}", "value": of["score"], "n": of["n"], "low": low,
                         "high": high})
        if task in (HARMFUL_SCORE, PHRASES_SCORE) and "no_answer" in result:
            unread = result.get("unread", 0)
            for measure, count, n in (("no_answer", result["no_answer"], result["n"]),
                                      ("unread", unread, result["n"] + unread)):
                low, high = wilson_interval(count, n)
                rows.append({**row, "measure": measure, "value": percent(count, n), "n": n, "low": low, "high": high})
    return rows


def measured_rows(cell: Cell, stage: str, step: int, measured: Mapping[str, Any]) -> list[Row]:
    """Rows of {measure: number, or [L] numbers by layer}, of seven significant digits."""
    def row(measure, value, **more):
        return {**cell._asdict(), "stage": stage, "step": step, "measure": measure, **more,
                "value": float(f"{float(value):.7g}")}

    rows = []
    for measure, value in measured.items():
        value = np.asarray(value)
        rows += [row(measure, value)] if value.ndim == 0 else [
            row(measure, v, layer=layer) for layer, v in enumerate(value)]
    return rows


def table(rows: Iterable[Row]) -> "pd.DataFrame":
    """Rows as a table with all columns; numbers that a row does not have are NaN."""
    import pandas as pd

    found = pd.DataFrame(list(rows), columns=list(COLUMNS))
    for column in ("layer", "value", "n", "low", "high"):
        found[column] = found[column].astype(float)
    return found


def write(path: Path, found: "pd.DataFrame") -> None:
    """Writes the table whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    found.to_csv(temporary, index=False)
    os.replace(temporary, path)
