"""The report of whatever folder a command leaves: a training run, an evaluation, a plan, a comparison of judges."""

import os
from pathlib import Path

from jaxvaccine.evaluation.agreement import Agreement
from jaxvaccine.evaluation.tasks import Rate
from jaxvaccine.experiment import compare_judges, evaluate, runs
from jaxvaccine.experiment.plans import GRIDS
from jaxvaccine.experiment.run import PlanConfig
from jaxvaccine.json_files import read_json
from jaxvaccine.report import accounts, names, recipe, tables
from jaxvaccine.report.agreement import agreement_report
from jaxvaccine.report.evaluation import write_evaluation_report
from jaxvaccine.report.panels import panels_report
from jaxvaccine.report.plan import Cells, plan_report
from jaxvaccine.report.results import read_results
from jaxvaccine.report.training import write_training_report


def write(folder: str | os.PathLike) -> None:
    """report.md and the plots of a finished run, or of a plan's cells so far.

    Raises:
      FileNotFoundError: it is not such a folder.
    """
    folder, config = Path(folder), runs.read_config(folder)
    flags = config["flags"]
    if config["script"] == "align":
        again = f" of {flags['start']}" if flags.get("start") else ""
        write_training_report(folder, f"Alignment{again} with {names.method(flags['defense'])}")
    elif config["script"] == "finetune":
        p = config["data"].get("poison_ratio", flags["poison_ratio"])
        write_training_report(folder, f"Fine-tuning of {flags['aligned']} with p = {p:g}")
    elif config["script"] == "evaluate":
        write_evaluation_report(folder, flags["trained"] or flags["model"] or flags.get(
            "answers"), read_json(folder / evaluate.RESULTS))
    else:
        plan = config["operational"]["plan"]
        cells = Cells([tuple(pair) for pair in plan["pairs"]], plan["backbones"], plan["seeds"])
        title = f"Harmful fine-tuning of {', '.join(cells.backbones)}"
        tables.write_report(folder, "\n".join([
            plan_report(read_results(folder), folder, title, cells, recipe.faced(folder)), recipe.fewer_data(folder),
            accounts.of_plan(folder)]))


def read(folder: str | os.PathLike) -> str:
    """The text of a folder's report."""
    return (Path(folder) / tables.REPORT).read_text(encoding="utf-8")


def write_plan(config: PlanConfig) -> str:
    """The report of a plan that has been carried out; its text."""
    if not config.plan:
        write(config.run_dir)
        return read(config.run_dir)
    folder, panels = Path(config.run_dir), config.panels()
    of_panels = panels_report(read_results(folder), folder, GRIDS[config.plan].title, panels, config.model,
                              config.seeds)
    tables.write_report(folder, "\n".join([
        of_panels, recipe.section(folder), recipe.fewer_data(folder), accounts.of_plan(folder)]))
    return read(folder)


def write_agreement(run_dir: str | os.PathLike, first: str, second: str) -> str:
    """The report of a comparison of two judges of these names; its text."""
    found = read_json(Path(run_dir) / compare_judges.RESULTS)
    against = found.pop("against", None)
    rate = found["rate"] and Rate(**{**found["rate"], "interval": tuple(found["rate"]["interval"])})
    tables.write_report(run_dir, agreement_report(
        Agreement(**{**found, "rate": rate}), first, second, compare_judges.DISAGREEMENTS, against))
    return read(run_dir)
