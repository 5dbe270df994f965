"""The budget ratio of a plan's attacks: by how much the alignment could move the model more than the attack could."""

import pandas as pd

from jaxvaccine.experiment.budget import PUBLISHED
from jaxvaccine.report import names, results

_ALIGNMENT = ["backbone", "method", "seed"]  # what tells one alignment from another


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of every scored step of every attack, the alignment's budget over the attack's in the column `ratio`.

    Runs that have no budgets, such as those of earlier versions, have no row.
    """
    aligned = results.pick(results.aligned(table), measure=names.BUDGET)[[*_ALIGNMENT, "value"]]
    attacked = results.pick(table, stage="attack", measure=names.BUDGET)
    found = attacked.merge(aligned.rename(columns={"value": "aligned"}), on=_ALIGNMENT)
    # A learning rate of 0 moves nothing.
    return found.assign(ratio=found["aligned"] / found["value"].where(found["value"] > 0)).drop(columns="aligned")


def text(ratio: float) -> str:
    """"250 : 1", of three digits."""
    return f"{float(f'{ratio:.3g}'):g} : 1"


def ratio_note(table: pd.DataFrame) -> str:
    """A line that gives the ratio at every attack's end, and what it means; "" where none is known."""
    found = ratios(table)
    if not len(found):
        return ""
    last = found[found["step"] == found.groupby(results.CELL)["step"].transform("max")]
    by_ratio: dict[str, dict[str, list[str]]] = {}
    for (method, attack), rows in last.groupby(["method", "attack"], sort=False):
        by_ratio.setdefault(text(rows["ratio"].mean()), {}).setdefault(names.attack(attack), []).append(
            names.method(method))
    everyone = {names.method(method) for method in last["method"].unique()}

    def whose(of: dict[str, list[str]]) -> str:
        return "; ".join(attack + ("" if {*methods} == everyone else f" ({', '.join(methods)})")
                         for attack, methods in of.items())

    shown = last["ratio"].to_numpy()
    low, high = PUBLISHED
    where = ("as the published experiments do" if (shown >= low).all() and (shown <= high).all() else
             "in part outside of the published experiments' range" if (shown >= low).any() and (shown <= high).any()
             else "outside of the published experiments' range")
    return ("Budget ratio, learning rate times LoRA scale summed over the alignment's steps against the attack's: "
            + ", ".join(f"{ratio} with {whose(of)}" for ratio, of in by_ratio.items())
            + f". The attacks lie {where}, {low:g} to {high:g} : 1: "
            "the smaller the ratio, the more an attack can move what the alignment has set.\n")
