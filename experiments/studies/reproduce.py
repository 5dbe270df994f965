"""A paper's list of experiments with its recipes on a given model, the published figures beside ours.

  python -m experiments.studies.reproduce --paper=t_vaccine --run_dir=runs/t_vaccine
  python -m experiments.studies.reproduce --paper=booster --run_dir=runs/booster --model=meta-llama/Llama-2-7b-hf \\
      --alignment_data=beavertails_with_refusals:beavertails_with_refusals_train.json[5001:10000] \\
      --harmful_data=instructions:beavertails_with_refusals_train.json[5001:10000] \\
      --attack_user_data=sst2:stanfordnlp/sst2@train \\
      --attack_harmful_data=instructions:beavertails_with_refusals_train.json[1:] \\
      --harmful_test=beavertails_unsafe:PKU-Alignment/BeaverTails@30k_test[0:1000] \\
      --sst2_test=sst2:stanfordnlp/sst2@validation --judge=beaver_dam --data_protocol=rows

The first is on the small world that comes with the package, at a reduced list. A plan that is carried out cell by cell:
re-running continues where it stopped. The user's task is that of the data; the papers' other tasks and models are a
command each."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from absl import flags

from experiments.benchmarks.memory import step_memory
from experiments.studies import published
from jaxvaccine import cli, world
from jaxvaccine.experiment import plans, recipes, stage
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.config import field, make, require
from jaxvaccine.experiment.evaluate import EvaluateConfig
from jaxvaccine.experiment.plans import Panel, Plan, Point
from jaxvaccine.experiment.run import PlanConfig, make_settings, run
from jaxvaccine.report import accounts, tables
from jaxvaccine.report import runs as reports
from jaxvaccine.report.panels import panels_report
from jaxvaccine.report.published import comparison, largest_drop, table_cells
from jaxvaccine.report.results import read_results

ACCURACY_TESTS = ("sst2_test", "agnews_test", "gsm8k_test")
TITLES = {"booster": "Booster (arXiv 2409.01586)", "t_vaccine": "T-Vaccine (arXiv 2410.09760)"}


class Values(NamedTuple):
    """What a list runs through. The papers' tables go over p and n; the other values are ours, around the recipes'."""

    ratios: Sequence[str]
    counts: Sequence[str]
    length: str  # of the attacks over n
    lam: Sequence[str]
    alpha: Sequence[str]
    rho: Sequence[str]
    layers: Sequence[str]


FULL = Values(("0", "0.05", "0.1", "0.15", "0.2"), ("500", "1000", "1500", "2000", "2500"), "",
              ("0", "1.0", "5.0", "25.0"), ("0.01", "0.1", "1.0"), ("1.0", "3.0", "10.0"), ("4", "8", "16"))
REDUCED = Values(("0", "0.1", "0.2"), ("100", "500", "1000"), f":steps=0:epochs={plans.WORLD_EPOCHS:g}",
                 ("0", "0.1", "0.2", "0.4"), ("0.03", "0.1", "0.3"), ("1.5", "5.0", "15.0"), ("1", "3", "6"))


def booster_list(values: Values, recipe: Mapping[str, Any]) -> list[Panel]:
    methods = ("sft", "vaccine", "booster", "booster:base_defense=vaccine")
    return [*plans.ratios(methods, values.ratios), *plans.samples(methods, values.counts, values.length),
            plans.over("Weight of the regularizer (0: none)", "lam", values.lam, ("booster",), recipe),
            plans.over("Length of the simulated step", "alpha", values.alpha, ("booster",), recipe)]


def t_vaccine_list(values: Values, recipe: Mapping[str, Any]) -> list[Panel]:
    methods = ("sft", "vaccine", "t_vaccine", "t_vaccine:freeze=released")
    return [*plans.ratios(methods, values.ratios), *plans.samples(methods, values.counts, values.length),
            plans.over("Norm of the perturbation", "rho", values.rho, ("t_vaccine",), recipe),
            plans.over("Active layers S", "layers", values.layers, ("t_vaccine",), recipe),
            Panel("How layers are chosen", "", {"t_vaccine": [
                Point("T-Vaccine", "t_vaccine"), Point("uniform probabilities", "t_vaccine:importance=uniform"),
                Point("the most probable layers", "t_vaccine:draw=top")]})]


LISTS = {"booster": booster_list, "t_vaccine": t_vaccine_list}


@dataclasses.dataclass(frozen=True)
class ReproduceConfig(PlanConfig):
    """Plan."""

    paper: Literal["booster", "t_vaccine"] = field("booster", "Whose list and recipes.")
    score_base: bool = field(False, "Score the backbone as it comes too.")

    def __post_init__(self):
        super().__post_init__()
        require(len(self.model) == 1, "model", self.model, "one backbone")
        if self.recipe == "auto":
            object.__setattr__(self, "recipe", "world" if self.model[0] == world.NAME else "published")

    def panels(self) -> list[Panel]:
        recipe = recipes.WORLD_ALIGN if self.on_world else recipes.ALIGN[self.paper]
        return LISTS[self.paper](REDUCED if self.on_world else FULL, recipe)

    def make_plan(self) -> Plan:
        return Plan(self.model, plans.pairs(self.panels()), tuple(map(int, self.seeds)))


def claim(config: ReproduceConfig, found, cells, align: Mapping[str, Any]) -> str:
    """What the paper's statement in `published.CLAIMS` is here."""
    if config.paper == "booster":
        return largest_drop(found, cells, "booster")
    architecture, dtype = stage.read_architecture(config.model[0]), "float32"

    def memory(defense: str) -> float:
        recipe = recipes.WORLD_ALIGN if config.on_world else recipes.ALIGN[defense]
        aligned = make(AlignConfig, {**align, "defense": defense}, {
            **recipe, "model": config.model[0], "run_dir": "-"})
        return sum(step_memory(aligned, dtype, architecture))

    return f"{100 * (memory('t_vaccine') / memory('vaccine') - 1):+.2f}% (XLA's buffer assignment of a step, {dtype})"


def check_scores(scores: EvaluateConfig) -> None:
    """Raises FieldError unless there is something to score HS and FA on."""
    require(bool(scores.tests.harmful_test), "harmful_test", scores.tests.harmful_test, "harmful prompts for HS")
    require(any(getattr(scores.tests, name) for name in ACCURACY_TESTS), "sst2_test", scores.tests.sst2_test,
            "data for FA, or one of " + ", ".join(f"--{name}" for name in ACCURACY_TESTS[1:]))


def reproduce(config: ReproduceConfig, align: Mapping[str, Any], attack: Mapping[str, Any], scores: Mapping[str, Any]
              ) -> str:
    """Carries out what has not been carried out yet; returns the report. Arguments as of `run`."""
    settings = make_settings(config, align, attack, scores)
    check_scores(settings.scores)
    run(config, align, attack, scores, written=reports.write)
    folder, panels = Path(config.run_dir), config.panels()
    found = read_results(folder)
    n = settings.attack["sft"].get("n", 1000)
    cells = table_cells(panels[0], panels[1], plans.ATTACK.partition("=")[2], n)
    statements = [[what, number, claim(config, found, cells, align), source]
                  for what, number, source in published.CLAIMS[config.paper]]
    tables.write_report(folder, "\n".join([
        f"# {TITLES[config.paper]}, on {config.model[0]}\n", "## Published figures and ours\n",
        "Published figures are those with a source that can be cited; a model other than the published one is another "
        "experiment, and the difference then says how far it carries over.\n",
        comparison(found, cells, published.TABLES[config.paper]),
        tables.table(["statement", "published", "ours", "source"], statements),
        panels_report(found, folder, "", panels, config.model, config.seeds), accounts.of_plan(folder)]))
    return reports.read(folder)


SECTION = cli.Section(ReproduceConfig, without=(
    "plan", "recipe", "lanes", "score_steps", "defenses", "attacks", "poison_ratios"))


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config = make(ReproduceConfig, cli.given(SECTION, values))
        print(reproduce(config, *(cli.given(of, values) for of in (cli.ALIGNMENT, cli.ATTACK, cli.EVALUATION))))


VERB = cli.Verb(__doc__, (SECTION, cli.ALIGNMENT, cli.ATTACK, cli.EVALUATION), call)

if __name__ == "__main__":
    cli.call("reproduce", VERB)
