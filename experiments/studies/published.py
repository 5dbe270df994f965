"""Figures that the papers state, each with its source (published.csv); what is not there is not known here.

A row is a number: of which paper's list and table, method, model, user's task, p, n, setting, step, layer and measure.
`confidence`: high (printed by the authors or in a full text), reprint (in another paper's full text), exact (a vector
figure's coordinates), digitised (read off a figure, ±0.01 of losses and ±0.5 of HS), medium (quoted by readers of the
full text), third party (another paper's run of the method). Figures that are only known to be about right are left out.
"""

import functools
from pathlib import Path

import numpy as np
import pandas as pd

from jaxvaccine.experiment.budget import budgets
from jaxvaccine.experiment.parts import AdapterPart, TrainingPart
from jaxvaccine.report.regime import CONTINUED, NEW, Published

PATH = Path(__file__).with_name("published.csv")
TEXTS = ("reported_by", "list", "table", "method", "model", "task", "poison_ratio", "n", "setting", "measure", "unit",
         "source", "confidence")


@functools.cache
def load() -> pd.DataFrame:
    """All of it: `value` is a number, `step` and `layer` are NaN where there is none, the others are text."""
    return pd.read_csv(PATH, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False,
                       na_values={"step": [""], "layer": [""]})


def budget_ratio(alignment: TrainingPart, aligned: AdapterPart, attack: TrainingPart, attacked: AdapterPart,
                 rows: tuple[int, int], steps: np.ndarray) -> np.ndarray:
    """[S] of the ratio after the attack's `steps`, those of a run on rows = (aligned, the user's)."""
    before = budgets(alignment, aligned, alignment.count_steps(rows[0]))[-1]
    return before / budgets(attack, attacked, attack.count_steps(rows[1]))[steps]
