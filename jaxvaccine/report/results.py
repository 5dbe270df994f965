"""The tidy table of a plan's results, and the parts of it that reports show.

A row is a measured number (jaxvaccine/experiment/results.py). Scores of an aligned model stand at the last step of its
alignment; an attack has rows for its steps from 1 on, and its step 0 is the aligned model.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from jaxvaccine.experiment.plans import split_method
from jaxvaccine.experiment.results import COLUMNS, TABLE
from jaxvaccine.report.statistics import RUN, own_intervals

TEXTS = ("backbone", "method", "attack", "stage", "measure")
WHOLE = ("seed", "step")
NUMBERS = ("layer", "value", "n", "low", "high")
STAGES = ("backbone", "alignment", "attack")
# What tells a row from every other.
KEY = ["backbone", "method", "attack", "seed", "stage", "step", "measure", "layer"]
CELL = ["backbone", "method", "attack", "seed"]


def read_results(folder: str | Path) -> pd.DataFrame:
    """The table of a plan's folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a column is missing or holds something unexpected, a stage is unknown, or a row is there twice.
    """
    path = Path(folder) / TABLE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected the results of a plan")
    # "NA" may be a name; an empty number is NaN.
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := [name for name in COLUMNS if name not in table]:
        raise ValueError(f"{path}: found no column {missing[0]!r}, expected {', '.join(COLUMNS)}")
    for name in (*WHOLE, *NUMBERS):
        text = table[name].replace("", "nan")
        found = pd.to_numeric(text, errors="coerce")
        bad = found.isna() & (text.str.lower() != "nan") if name in NUMBERS else found.isna() | (found % 1 != 0)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ValueError(f"{path}: line {row + 2}: column {name!r}: found {table[name][row]!r}, expected a "
                             f"{'number' if name in NUMBERS else 'whole number'}")
        table[name] = found.astype(float if name in NUMBERS else int)
    if unknown := sorted(set(table["stage"]) - set(STAGES)):
        raise ValueError(f"{path}: column 'stage': found {unknown[0]!r}, expected one of {', '.join(STAGES)}")
    if (twice := table.duplicated(KEY)).any():
        row = int(np.flatnonzero(twice)[0])
        what = ", ".join(f"{name} {table[name][row]}" for name in KEY)
        raise ValueError(f"{path}: line {row + 2}: found a second row of {what}, expected one")
    return table[list(COLUMNS)]


def pick(rows: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The rows whose columns have these values."""
    mask = np.ones(len(rows), dtype=bool)
    for name, value in values.items():
        mask &= (rows[name] == value).to_numpy()
    return rows[mask]


def runs(rows: pd.DataFrame) -> set[tuple[str, int]]:
    """The runs, (backbone, seed), that rows are of."""
    return set(zip(rows["backbone"], rows["seed"], strict=True))


def backbones(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the backbones as they come."""
    return pick(table, stage="backbone")


def aligned(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of every aligned model at its last step, those by layer left out.

    A defense of the fine-tuning stage starts from another's aligned model: where "sft+lisa" has no rows of its own,
    it has those of "sft".
    """
    rows = pick(table, stage="alignment")
    rows = rows[rows["layer"].isna()]
    rows = rows[rows["step"] == rows.groupby(["backbone", "method", "seed"])["step"].transform("max")]
    parts = [rows]
    for method in table["method"].unique():
        first, tuning = split_method(method)
        if tuning and not (rows["method"] == method).any():
            parts.append(pick(rows, method=first).assign(method=method))
    return pd.concat(parts) if len(parts) > 1 else rows


def attacked(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of every attack at its last step."""
    rows = pick(table, stage="attack")
    rows = rows[rows["layer"].isna()]
    return rows[rows["step"] == rows.groupby(CELL)["step"].transform("max")]


def along(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Rows of a measure over the steps of every attack, with the aligned model as step 0 of each attack on it."""
    rows = pick(table, stage="attack", measure=measure)
    rows = rows[rows["layer"].isna()]
    start = pick(aligned(table), measure=measure).drop(columns=["attack", "step"]).merge(
        rows[CELL].drop_duplicates(), on=["backbone", "method", "seed"]).assign(step=0)
    # A measure that depends on the attack may have been taken at its step 0 itself.
    return pd.concat([start, rows])[list(COLUMNS)].drop_duplicates([*CELL, "step"], keep="last") if len(start) else rows


def has_steps(rows: pd.DataFrame) -> bool:
    """Whether an attack of `along` was scored on its way, so that there is more than its start and its end."""
    return bool((rows.groupby(CELL)["step"].nunique() > 2).any())


def mean_along(rows: pd.DataFrame, percent: bool = False) -> pd.DataFrame:
    """Means over the steps of one cell's runs (of `along`), a row per run as `statistics.estimate_rows` takes them.

    By the trapezoid rule. A run's start and end alone have none. All steps answer the same prompts, so that the ends of
    a run's interval are the means of its steps' ends.
    """
    found = []
    for run, of in rows.groupby(RUN, sort=False):
        of = of.sort_values("step")
        steps = of["step"].to_numpy()
        if len(steps) > 2:
            columns = np.column_stack([of["value"], own_intervals(of, percent)])
            means = np.trapezoid(columns, steps, axis=0) / (steps[-1] - steps[0])
            found.append(dict(zip([*RUN, "value", "low", "high"], [*run, *means], strict=True)))
    return pd.DataFrame(found, columns=[*RUN, "value", "n", "low", "high"])
