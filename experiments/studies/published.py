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

from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.budget import budgets
from jaxvaccine.experiment.config import names
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


def published_ratio(paper: str, method: str) -> np.ndarray:
    """[S + 1] budget ratios of a paper's run before and after every step of its attack; infinite before the first."""
    align, attack = recipes.alignment(paper, method), recipes.attack(paper, method)

    def sides(flat_values):
        return [kind(**{name: value for name, value in flat_values.items() if name in names(kind)})
                for kind in (TrainingPart, AdapterPart)]

    training, adapter = sides(align)
    attacked, new = sides({**{name: align[name] for name in ("rank", "lora_alpha")}, **attack})
    before = budgets(training, adapter, training.count_steps(recipes.rows(paper, method)["alignment"]))[-1]
    with np.errstate(divide="ignore"):
        return before / budgets(attacked, new, attacked.count_steps(attack["n"]))


def harm_curves() -> list[Published]:
    """Published HS over budget ratios, of Llama-2-7B under p = 0.1: Booster's figure, and the ends of other attacks."""
    found, curves = load(), []
    for method, adapter in (("sft", NEW), ("booster", CONTINUED)):
        rows = found[(found["table"] == "statistics") & (found["measure"] == "harmful_score")
                     & (found["method"] == method) & (found["step"] > 0)].sort_values("step")
        ratio = published_ratio("booster", method)
        curves.append(Published(method, adapter, ratio[rows["step"].astype(int)].tolist(), rows["value"].tolist(),
                                "published"))
    for paper, table, method, adapter in (
            ("booster", "ratios", "sft", NEW), ("booster", "ratios", "vaccine", NEW),
            ("booster", "ratios", "booster", CONTINUED), ("t_vaccine", "main", "t_vaccine", NEW)):
        rows = found[(found["list"] == paper) & (found["table"] == table) & (found["method"] == method)
                     & (found["poison_ratio"] == "0.1") & (found["measure"] == "harmful_score")]
        curves.append(Published(method, adapter, [float(published_ratio(paper, method)[-1])],
                                rows["value"].tolist()[:1], "published table"))
    return curves
