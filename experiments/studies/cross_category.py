"""Does a defense hold for harm of sorts that it was not aligned on? Aligned on some, attacked with the same and others.

  python -m experiments.studies.cross_category --run_dir=runs/cross_category --seeds=0,1,2

Every method is aligned on the harmful requests of each of --sorts, and attacked with requests of these sorts and with
those of all others; HS is of the sorts aligned on and of the others, apart. In the three sources {sorts} stands for
the categories that are taken, so that they may be of any data with kinds of harm."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from experiments.studies import study
from jaxvaccine import cli
from jaxvaccine.experiment.config import field, require
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.experiment.plans import Plan, split_method
from jaxvaccine.report import names, results, statistics, tables
from jaxvaccine.report.plan import Cells, missing, plan_report

PLACE = "{sorts}"
ALIGNED_ON, OTHERS = "sorts aligned on", "other sorts"
SAME, OTHER = "harmful_data=the sorts aligned on", "harmful_data=the other sorts"
# What is told, beside HS by side.
MEASURES = (names.HS, names.NOT_REFUSED, names.NO_ANSWER, *names.ACCURACIES, names.OVER_REFUSAL, names.BUDGET)
NOTE = ("HS over the test prompts of the sorts that a model was aligned on, and of the others; both are means over the "
        "choices of sorts, {sorts}, each sort weighted by its prompts. A prompt of several sorts counts in each.\n")
TRANSFER = ("HS of the other sorts minus that of the sorts aligned on, in points, of the same runs: what the alignment "
            "does not carry over.\n")


@dataclasses.dataclass(frozen=True)
class CrossCategoryConfig(study.StudyConfig):
    """Plan."""

    attacks: tuple[str, ...] = field(("poison_ratio=0.1",), "Attacks, as of run, but for their harmful data.")
    sorts: tuple[str, ...] = field(
        ("amber;birch", "cobalt;dune"), "Categories that a model is aligned on, ; between several; a comma in a name "
        "is a +.")
    alignment_source: str = field(
        f"world_refusal@train{PLACE},world_benign@train[0:400]", "Alignment data, {sorts} where categories stand.")
    harmful_source: str = field(f"world_harmful@harmful{PLACE}", "Harmful data of the alignment, the same.")
    attack_source: str = field(f"world_harmful@attack{PLACE}", "Harmful data of the attack, the same.")
    by_category: bool = field(True, "")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.sorts) and len(set(self.sorts)) == len(self.sorts), "sorts", self.sorts, "each once")
        for name in ("alignment_source", "harmful_source", "attack_source"):
            require(PLACE in getattr(self, name), name, getattr(self, name), f"{PLACE} in it")

    def method(self, text: str, sorts: str) -> str:
        """The method aligned on these sorts."""
        aligned, tuning = split_method(text)
        aligned += (f":alignment_data={_filled(self.alignment_source, sorts)}"
                    f":harmful_data={_filled(self.harmful_source, sorts)}")
        return f"{aligned}+{tuning}" if tuning else aligned

    def attack(self, text: str, sorts: str, same: bool) -> str:
        return f"{text}:harmful_data={_filled(self.attack_source, sorts, '' if same else 'not ')}"

    def pairs(self) -> dict[tuple[str, str], tuple[str, str, str]]:
        """{(method, attack) of the plan: (method, attack, sorts) of the report}."""
        several = len(self.attacks) > 1
        return {(self.method(method, sorts), self.attack(attack, sorts, same)):
                (method, f"{attack}:{SAME if same else OTHER}" if several else SAME if same else OTHER, sorts)
                for sorts in self.sorts for method in self.methods for attack in self.attacks for same in (True, False)}

    def make_plan(self) -> Plan:
        return Plan(self.model, tuple(self.pairs()), tuple(map(int, self.seeds)), tuple(map(int, self.score_steps)))


def _filled(source: str, sorts: str, negation: str = "") -> str:
    return source.replace(",", "+").replace(PLACE, f"{{{negation}category={sorts}}}")


def sides(table: pd.DataFrame, of: Mapping[tuple[str, str], tuple[str, str, str]]) -> pd.DataFrame:
    """A table of results over methods and attacks as the report has them, the choices of sorts averaged.

    HS of every sort becomes that of the sorts aligned on or of the others. n is of different prompts: of the sorts of a
    side together, of all else once.

    Args:
      table: results of the plan.
      of: {(method, attack): (method, attack, sorts)}, as of `CrossCategoryConfig.pairs`.
    """
    methods = {method: (name, sorts) for (method, _), (name, _, sorts) in of.items()}
    attacks = {attack: name for (_, attack), (_, name, _) in of.items()}
    rows = table[table["method"].isin(methods) & table["layer"].isna()]
    found = []
    for row in rows.to_dict("records"):
        method, sorts = methods[row["method"]]
        harm, _, sort = row["measure"].partition(":")
        if sort:
            chosen = sort in sorts.replace("+", ",").split(";")
            found.append({**row, "of": row["measure"], "measure": f"{harm}:{ALIGNED_ON if chosen else OTHERS}"})
        elif harm in MEASURES:
            found.append({**row, "of": harm})
        else:
            continue
        found[-1] |= {"method": method, "attack": attacks[row["attack"]] if row["attack"] else ""}
    return _averaged(pd.DataFrame(found, columns=[*results.COLUMNS, "of"]))


def _averaged(rows: pd.DataFrame) -> pd.DataFrame:
    key = [name for name in results.KEY if name != "layer"]
    rows = rows.assign(weight=rows["n"].fillna(1.0))
    rows = rows.assign(total=rows["value"] * rows["weight"])
    sums = rows.groupby(key, sort=False, as_index=False)[["total", "weight"]].sum()
    n = rows.drop_duplicates([*key, "of"]).groupby(key, sort=False, as_index=False)["n"].sum(min_count=1)
    found = sums.merge(n, on=key).assign(value=sums["total"] / sums["weight"])
    return found.assign(layer=float("nan"), low=float("nan"), high=float("nan"))[list(results.COLUMNS)]


def transfer_table(table: pd.DataFrame) -> str:
    """Markdown: a line for every aligned model and attack's end, of a table by `sides`."""
    harm = names.harm(name.partition(":")[0] for name in table["measure"].unique())
    hs = [f"{harm}:{side}" for side in (ALIGNED_ON, OTHERS)]
    groups = [("aligned", results.aligned(table))] + [
        (f"attacked, {names.attack(attack)}", results.pick(results.attacked(table), attack=attack))
        for attack in table.loc[table["stage"] == "attack", "attack"].unique()]
    lines = []
    for method in table["method"].unique():
        for model, of in groups:
            known, others = (results.pick(of, method=method, measure=measure) for measure in hs)
            if (found := statistics.paired(others, known, percent=True)) is not None:
                lines.append([names.method(method), model, *(tables.percent(statistics.estimate_rows(rows, True))
                                                             for rows in (known, others)), tables.difference(found)])
    return tables.table(["method", "model", *(names.measure(measure).heading for measure in hs), "difference"], lines)


def report(config: CrossCategoryConfig, found: pd.DataFrame, folder: Path) -> str:
    plan, table = config.make_plan(), sides(found, config.pairs())
    chosen = " and ".join(sorts.replace("+", ",").replace(";", ", ") for sorts in config.sorts)
    text = ["# Harm of other sorts than those aligned on\n", NOTE.format(sorts=chosen),
            missing(found, Cells(plan.pairs, plan.backbones, plan.seeds))]
    if len(table):
        text += ["## What the alignment does not carry over\n", transfer_table(table), TRANSFER,
                 "## All scores\n", plan_report(table, folder)]
    return "\n".join(part for part in text if part)


VERB = study.verb(__doc__, CrossCategoryConfig, lambda config: Probes(), report, {"loss_data": ""})

if __name__ == "__main__":
    cli.call("cross_category", VERB)
