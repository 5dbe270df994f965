"""Does a defense work on other architectures than LLaMA's? The same small world, on bases of several families.

  python -m experiments.studies.architectures --run_dir=runs/architectures --seeds=0,1,2

`python -m experiments.tools.make_world_base --directory=bases/gemma2 --family=gemma2` makes a base; bases of one family
count as its backbones. One row a family: HS and FA of every method, and the difference to SFT on the same base."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from experiments.studies import study
from jaxvaccine import cli, world
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.config import field
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.report import curves, names, plots, results, statistics, tables
from jaxvaccine.report.differences import REFERENCE
from jaxvaccine.report.plan import Cells, missing, plan_report
from jaxvaccine.report.style import styles

FIGURE = "architectures.png"
FAMILIES = {"llama": "LLaMA", "mistral": "Mistral", "qwen2": "Qwen2", "gemma2": "Gemma2"}
NOTE = ("A row's means and intervals are over its family's bases and seeds; of a single base they say nothing about "
        "others of the family.\n")


@dataclasses.dataclass(frozen=True)
class ArchitecturesConfig(study.StudyConfig):
    """Plan."""

    model: tuple[str, ...] = field(
        (world.NAME, "bases/mistral", "bases/qwen2", "bases/gemma2"), "Backbones, one or more of each family.")
    defenses: tuple[str, ...] = field(("sft", "t_vaccine", "booster"), "Methods, as of run.")
    attacks: tuple[str, ...] = field(("poison_ratio=0.1",), "Attacks, as of run.")


def families_of(backbones: tuple[str, ...]) -> dict[str, list[str]]:
    """{family as people write it: its backbones}, in the order given."""
    found: dict[str, list[str]] = {}
    for backbone in backbones:
        kind = stage.read_architecture(backbone).model_type
        found.setdefault(FAMILIES.get(kind, kind), []).append(backbone)
    return found


def family_table(config: ArchitecturesConfig, families: Mapping[str, list[str]], cell: Callable[[str, str], str]
                 ) -> str:
    """Markdown: a row a family, a column a method. cell: (family, method) -> text."""
    return tables.table(["family", "bases", *map(names.method, config.methods)], [
        [family, str(len(backbones)), *(cell(family, method) for method in config.methods)]
        for family, backbones in families.items()])


def attack_tables(config: ArchitecturesConfig, families: Mapping[str, list[str]], table: pd.DataFrame, attack: str
                  ) -> list[str]:
    """Markdown of one attack: HS at its end and along it, the difference to SFT's, and FA."""
    measures = table["measure"].unique()
    harm, task = names.harm(measures), names.accuracy(measures)
    along, attacked, aligned = results.along(table, harm), results.attacked(table), results.aligned(table)

    def rows_at_the_end(family: str, method: str, measure: str) -> pd.DataFrame:
        return _of(families[family], results.pick(attacked, method=method, attack=attack, measure=measure))

    def rows_along(family: str, method: str) -> pd.DataFrame:
        return results.mean_along(_of(families[family], results.pick(along, method=method, attack=attack)), True)

    def percent(rows: pd.DataFrame) -> str:
        return tables.percent(statistics.estimate_rows(rows, True))

    def difference(family: str, method: str) -> str:
        if method == REFERENCE:
            return tables.NONE
        return tables.difference(statistics.paired(rows_along(family, method), rows_along(family, REFERENCE), True))

    name = names.measure(harm).name
    shown: dict[str, Callable[[str, str], str]] = {
        f"{name} % before the attack": lambda family, method: percent(_of(families[family], results.pick(
            aligned, method=method, measure=harm))),
        f"{name} % after the attack": lambda family, method: percent(rows_at_the_end(family, method, harm)),
        f"{name} % along the attack": lambda family, method: percent(rows_along(family, method))}
    if REFERENCE in config.methods:
        shown[f"{name} along the attack minus SFT's, points"] = difference
    if task:
        shown["FA % after the attack"] = lambda family, method: percent(rows_at_the_end(family, method, task))
    return [part for title, cell in shown.items() for part in (f"{title}:\n", family_table(config, families, cell))]


def _of(backbones: list[str], rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["backbone"].isin(backbones)]


def plot(path: Path, config: ArchitecturesConfig, families: Mapping[str, list[str]], table: pd.DataFrame, attack: str
         ) -> None:
    """A panel a family: HS over the attack's steps."""
    harm, looks = names.harm(table["measure"].unique()), styles(config.methods)
    figure, axes = plots.panels(len(families), columns=2)
    for axis, (family, backbones) in zip(axes, families.items(), strict=True):
        curves.plot_curves(axis, curves.attack_curves(_of(backbones, table), harm, attack), harm, "attack step", looks,
                           family)
    plots.legend(figure, axes, (plots.SD, plots.RUN))
    plots.save(figure, path)


def report(config: ArchitecturesConfig, found: pd.DataFrame, folder: Path) -> str:
    plan, families = config.make_plan(), families_of(config.model)
    harm = names.measure(names.harm(found["measure"].unique())).name
    text = ["# Other architectures\n", missing(found, Cells(plan.pairs, plan.backbones, plan.seeds)), NOTE]
    for i, attack in enumerate(config.attacks):
        name = FIGURE if i == 0 else FIGURE.replace(".", f"_{i}.")
        plot(folder / name, config, families, found, attack)
        text += [f"## {names.attack(attack)}\n", *attack_tables(config, families, found, attack),
                 f"![{harm} over attack steps, by family]({name})\n"]
    text += ["## All families together\n", plan_report(found, folder)]
    return "\n".join(part for part in text if part)


VERB = study.verb(__doc__, ArchitecturesConfig, lambda config: Probes(), report, {"loss_data": ""})

if __name__ == "__main__":
    cli.call("architectures", VERB)
