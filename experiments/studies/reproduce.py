"""A paper's tables in its recipes on a given model, the published figures beside ours.

  python -m experiments.studies.reproduce --paper=t_vaccine --run_dir=runs/t_vaccine
  python -m experiments.studies.reproduce --paper=booster --run_dir=runs/booster --model=meta-llama/Llama-2-7b-hf \\
      --dtype=bfloat16 --judge=beaver_dam --data_protocol=rows --table=ratios,samples --dry_run \\
      --alignment_data=beavertails_with_refusals:beavertails_with_refusals_train.json[5001:10000] \\
      --harmful_data=instructions:beavertails_with_refusals_train.json[5001:10000] \\
      --attack_user_data=sst2:stanfordnlp/sst2@train \\
      --attack_harmful_data=instructions:beavertails_with_refusals_train.json[1:] \\
      --harmful_test=beavertails_unsafe:PKU-Alignment/BeaverTails@30k_test[0:1000] \\
      --sst2_test=sst2:stanfordnlp/sst2@validation

The first is on the small world that comes with the package, at a reduced list. --dry_run checks everything, says what
would be carried out and what of the data and settings is other than the paper's, and ends. It is a plan that is carried
out cell by cell: re-running continues where it stopped. --protocol chooses the attacks: each method's own as released,
or one for all."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from absl import flags

from experiments.studies import paper_studies, paper_tables, published
from experiments.studies.paper_tables import Setting, Table
from jaxvaccine import cli, data, world
from jaxvaccine.experiment import carry_out as engine
from jaxvaccine.experiment import checks, recipes
from jaxvaccine.experiment.config import field, flat, make, require
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.parts import check_sources
from jaxvaccine.experiment.plans import Plan, Settings, cell_configs, split_method
from jaxvaccine.experiment.results import TABLE, Cell, write
from jaxvaccine.experiment.run import PlanConfig, check_given, make_settings
from jaxvaccine.report import accounts, budget, differences, names, recipe, tables
from jaxvaccine.report import published as beside
from jaxvaccine.report import runs as reports
from jaxvaccine.report.panels import panel_report
from jaxvaccine.report.results import read_results

ACCURACY_TESTS = ("sst2_test", "agnews_test", "gsm8k_test")
TITLES = {"booster": "Booster (arXiv 2409.01586)", "t_vaccine": "T-Vaccine (arXiv 2410.09760)"}
# Of the tasks that are not --attack_user_data's.
TASK_DATA = {"agnews": "agnews_data", "gsm8k": "gsm8k_data", "alpaca_eval": "alpaca_eval_data", "sst2": "sst2_data"}


@dataclasses.dataclass(frozen=True)
class ReproduceConfig(PlanConfig):
    """Plan."""

    paper: Literal["booster", "t_vaccine"] = field("booster", "Whose tables and recipes.")
    table: tuple[str, ...] = field((), "Which tables; all unless given. Booster: " + ", ".join(
        paper_tables.NAMES["booster"]) + ". T-Vaccine: " + ", ".join(paper_tables.NAMES["t_vaccine"]) + ".")
    sst2_data: str = field("", "The user's data of the tasks' table beside --attack_user_data.")
    agnews_data: str = field("", "The same, AG News.")
    gsm8k_data: str = field("", "The same, GSM8K.")
    alpaca_eval_data: str = field("", "The same, AlpacaEval's instructions.")
    dry_run: bool = field(False, "Check everything, say what would be carried out, and end.")
    score_base: bool = field(False, "Score the backbone as it comes too.")

    def __post_init__(self):
        super().__post_init__()
        if self.recipe == "auto":
            object.__setattr__(self, "recipe", "world" if self.model[0] == world.NAME else self.paper)
        require(self.recipe in ("world", self.paper), "recipe", self.recipe, f"world or {self.paper}")
        known = paper_tables.NAMES[self.paper]
        require(set(self.table) <= set(known), "table", self.table, "some of " + ", ".join(known))
        check_sources(self, *TASK_DATA.values())

    def make_plan(self) -> Plan:
        """Of the paper's rows under the usual attack: what the recipe is asked for."""
        return Plan.product(self.model[:1], tuple(recipes.METHODS[self.paper].values()), ("poison_ratio=0.1",),
                            tuple(map(int, self.seeds)))

    @property
    def tables(self) -> tuple[str, ...]:
        return self.table or paper_tables.NAMES[self.paper]


def setting_of(config: ReproduceConfig, align: Mapping[str, Any], attack: Mapping[str, Any]) -> Setting:
    """What the tables are made for, of the given flat values."""
    user_data = attack.get("user_data", recipes.WORLD_ATTACK["user_data"] if config.on_world else "")
    require(bool(user_data), "attack_user_data", user_data, "a data source")
    if config.on_world:
        usual = next(iter(recipes.kinds(user_data)))
        base, values = {**recipes.WORLD_ALIGN, **align}, paper_tables.REDUCED

        def of_attack(name: str, task: str) -> dict[str, Any]:
            del name, task
            return {"poison_ratio": 0.1, **recipes.WORLD_ATTACK, **attack}

        longer = ":steps=0:epochs={:g}:user_data=world_rating@attack+world_rating@more".format(
            recipes.WORLD_ATTACK["steps"] * recipes.WORLD_ATTACK["batch_size"] / recipes.WORLD_ATTACK["n"])
    else:
        harmful = recipes.harmful_of(align.get("harmful_data", ""), attack.get("harmful_data", ""))
        usual, longer = recipes.task_of(config.paper, user_data), ""
        base = {**recipes.alignment(config.paper, config.paper, harmful), **align}
        values = paper_tables.FULL[config.paper]

        def of_attack(name: str, task: str) -> dict[str, Any]:
            return {**recipes.attack(config.paper, name, task, config.protocol, harmful), **attack}

    others = {task: getattr(config, name) for task, name in TASK_DATA.items()
              if task != usual and getattr(config, name)}
    return Setting(config.paper, values, base, of_attack, {usual: user_data, **others}, config.model, longer)


class Plans(NamedTuple):
    """The papers' tables of a config, and what carries them out: of the first backbone, and of each other."""

    tables: Mapping[str, Table]
    plans: tuple[Plan, ...]


def plans_of(config: ReproduceConfig, setting: Setting) -> Plans:
    found = {name: table for name, table in paper_tables.TABLES[config.paper](setting).items() if name in config.tables}
    seeds, plans = tuple(map(int, config.seeds)), []
    for i in reversed(range(len(config.model))):  # the table of the first one stays
        pairs = dict.fromkeys((entry.method, entry.attack) for table in found.values() for entry in table.entries
                              if entry.backbone == i)
        order = dict.fromkeys(method for method, _ in pairs)
        if pairs:
            plans.append(Plan((config.model[i],), tuple(p for method in order for p in pairs if p[0] == method), seeds))
    return Plans(found, tuple(plans))


def check_scores(scores: EvaluateConfig) -> None:
    """Raises FieldError unless there is something to score HS and FA on."""
    require(bool(scores.tests.harmful_test), "harmful_test", scores.tests.harmful_test, "harmful prompts for HS")
    require(any(getattr(scores.tests, name) for name in ACCURACY_TESTS), "sst2_test", scores.tests.sst2_test,
            "data for FA, or one of " + ", ".join(f"--{name}" for name in ACCURACY_TESTS[1:]))


def deviation_rows(config: ReproduceConfig, settings: Settings, setting: Setting) -> list[list[str]]:
    """[stage, setting, the paper's, ours] of the paper's own method under its own attack, and of the rows read."""
    cell = Cell(config.model[0], setting.method(config.paper), f"poison_ratio={setting.ratio}", int(config.seeds[0]))
    aligned, attacked = cell_configs(settings, Path(config.run_dir), cell)
    task = setting.task if setting.task in recipes.TASKS[config.paper] else recipes.TASKS[config.paper][0]
    rows = []
    if config.on_world:
        rows.append(["all", "model", "Llama-2-7B", f"{config.model[0]}, of a million parameters"])
    rows += beside.deviations(flat(aligned), recipes.alignment(config.paper, config.paper), "alignment")
    resolved = {**flat(attacked), **{k: v for k, v in dataclasses.asdict(
        attacked.adapter.resolve(flat(aligned), attacked.method)).items() if k != "adapter"}}
    rows += beside.deviations(resolved, recipes.attack(config.paper, config.paper, task, config.protocol), "attack")
    rows += beside.deviations(flat(settings.scores), recipes.EVALUATION[config.paper], "evaluation")
    for name, count in counts_of(aligned.data).items():
        expected = recipes.rows(config.paper, config.paper).get(name)
        if expected and count != expected:
            rows.append(["alignment", f"{name} rows", str(expected), str(count)])
    return rows


def counts_of(part: Any) -> dict[str, int]:
    """{"alignment": rows, "harmful": rows} of an alignment's data."""
    return {name: len(data.load_examples(source, part.data_protocol)) for name, source in
            (("alignment", part.alignment_data), ("harmful", part.harmful_data)) if source}


def warnings_of(config: ReproduceConfig, settings: Settings, plans: Plans) -> list[str]:
    """Where a method of the plan reads fewer rows than the paper's, a sentence each."""
    found = []
    for name, text in recipes.METHODS[config.paper].items():
        if any(text in plan.methods for plan in plans.plans):
            aligned, attacked = cell_configs(settings, Path(config.run_dir), Cell(
                config.model[0], text, "poison_ratio=0.1", 0))
            counts = counts_of(aligned.data)
            if guides := attacked.data.alignment_data:
                counts["guide"] = len(data.load_examples(guides, attacked.data.protocol))
            if line := recipes.fewer_than_published(config.paper, name, counts):
                found.append(line)
    return found


def table_report(name: str, table: Table, found: pd.DataFrame, config: ReproduceConfig, folder: Path, index: int,
                 deviation: str) -> str:
    """Markdown of one of the papers' tables."""
    figures = published.load()
    figures = figures[(figures["list"] == config.paper) & figures["table"].isin(table.published)]
    panel, attacks = table.panel(), recipe.faced(folder)
    text = [f"## {table.title}\n", table.note + "\n" if table.note else "",
            "" if len(figures) else "No published figure of this table can be cited.\n"]
    if len(figures) or attacks or not panel.curves:  # else it would have nothing that the scores below have not
        text.append(beside.comparison(found, table.entries, config.model, figures, deviation, attacks))
    for over in ("poison_ratio", "n"):
        text.append(beside.averages(found, table.entries, config.model, figures, over))
    text.append(beside.unmatched(table.entries, figures[figures[["poison_ratio", "n"]].ne(beside.AVERAGE).all(axis=1)]))
    if panel.curves:
        # Its own table has what the comparison has not: over-refusal, no answer, the aligned model.
        text.append(panel_report(found, folder, panel, index).replace("## ", "### Scores: ", 1))
    return "\n".join(part for part in text if part)


def plan_text(config: ReproduceConfig, plans: Plans, lines: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """What a dry run says."""
    cells = sum(len(plan.pairs) * len(plan.seeds) for plan in plans.plans)
    aligned = sum(len({split_method(method)[0] for method in plan.methods}) * len(plan.seeds) for plan in plans.plans)
    return "\n".join([
        f"{TITLES[config.paper]} on {', '.join(config.model)}: {cells} attacks on {aligned} alignments, in "
        f"{len(plans.tables)} tables; attacks: {config.protocol}.",
        *(f"  {name}: {len(table.entries)} places. {table.note}" for name, table in plans.tables.items()),
        *(f"  {name}: a study of its own." for name in config.tables if name in paper_tables.STUDIES[config.paper]),
        *(f"Warning: {line}." for line in lines), "", "Other than the paper's:",
        tables.table(["stage", "setting", "paper", "here"], rows)])


def reproduce(config: ReproduceConfig, align: Mapping[str, Any], attack: Mapping[str, Any], scores: Mapping[str, Any]
              ) -> str:
    """Carries out what has not been carried out yet; returns the report, or of a dry run the plan. Arguments as of
    `run`."""
    settings = make_settings(config, align, attack, scores)._replace(own_task=True)
    check_scores(settings.scores)
    setting = setting_of(config, align, attack)
    plans, folder = plans_of(config, setting), Path(config.run_dir)
    for plan in plans.plans:
        check_given(plan, settings, align, attack)
    rows, lines = deviation_rows(config, settings, setting), warnings_of(config, settings, plans)
    if config.dry_run:
        for plan in plans.plans:
            checks.check_plan(plan, settings, folder, False, lambda aligned, attacked: None)
        return plan_text(config, plans, lines, rows)
    parts, overwrite = [], config.overwrite
    for plan in plans.plans:
        # A plan's own report, after every cell, would be of all tables in one and take as long as a cell.
        engine.carry_out(plan, settings, folder, score_backbones=config.score_base, overwrite=overwrite,
                         written=lambda of: None if of == folder else reports.write(of))
        overwrite = False
        parts.append(read_results(folder))
    found = pd.concat(parts[::-1], ignore_index=True) if parts else None
    if found is not None:
        write(folder / TABLE, found)  # of all models, and not of the last plan alone
    tables.write_report(folder, _report(config, settings, setting, plans, found, folder, rows, lines, (
        align, attack, scores)))
    return reports.read(folder)


def _report(config: ReproduceConfig, settings: Settings, setting: Setting, plans: Plans, found: pd.DataFrame | None,
            folder: Path, rows: Sequence[Sequence[str]], lines: Sequence[str], given: Sequence[Mapping[str, Any]]
            ) -> str:
    few = sorted({row[1] for row in rows if row[1] != "model"})
    deviation = f"{len(few)} settings" if few else ""
    text = [
        f"# {TITLES[config.paper]}, on {', '.join(config.model)}\n",
        *(f"**Warning: {line}.**\n" for line in lines),
        "Published figures are those with a source that can be cited. A figure of another model or of other settings "
        "is another experiment, and the difference then says how far it carries over. Attacks: "
        f"{'each as its authors released it' if config.protocol == 'released' else 'one for all methods'}.\n"]
    if found is not None:
        text += [table_report(name, table, found, config, folder, i, deviation)
                 for i, (name, table) in enumerate(plans.tables.items())]
    for name in config.tables:
        if name in paper_tables.STUDIES[config.paper]:
            text.append(paper_studies.STUDIES[name](config, settings, setting, folder, given))
    text += ["## Other than the paper's\n",
             f"Of {names.method(setting.method(config.paper))}, and alike of the others:\n",
             tables.table(["stage", "setting", "paper", "here"], rows) if rows else "Nothing.\n",
             tables.notes(config.model, config.seeds, "HS")]
    if found is not None:
        pairs = dict.fromkeys(pair for plan in plans.plans for pair in plan.pairs)
        text += [differences.section(found, list(pairs)), budget.ratio_note(found), recipe.section(folder),
                 accounts.of_plan(folder)]
    return "\n".join(part for part in text if part)


SECTION = cli.Section(ReproduceConfig, without=(
    "plan", "recipe", "lanes", "score_steps", "defenses", "attacks", "poison_ratios"))


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config = make(ReproduceConfig, cli.given(SECTION, values))
        print(reproduce(config, *(cli.given(of, values) for of in (cli.ALIGNMENT, cli.ATTACK, cli.EVALUATION))))


VERB = cli.Verb(__doc__, (SECTION, cli.ALIGNMENT, cli.ATTACK, cli.EVALUATION), call)

if __name__ == "__main__":
    cli.call("reproduce", VERB)
