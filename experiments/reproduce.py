"""A paper's list of experiments with its recipes on a given model, the published figures beside ours.

  python -m experiments.reproduce --paper=t_vaccine --run_dir=runs/t_vaccine
  python -m experiments.reproduce --paper=booster --run_dir=runs/booster --model=meta-llama/Llama-2-7b-hf \\
      --alignment_data=beavertails_with_refusals:refusals.json[0:5000] \\
      --harmful_data=beavertails_unsafe:train.jsonl[0:5000] --attack_user_data=sst2:stanfordnlp/sst2@train \\
      --attack_harmful_data=beavertails_unsafe:train.jsonl[5000:10000] \\
      --harmful_test=beavertails_unsafe:test.jsonl[0:1000] --sst2_test=sst2:stanfordnlp/sst2@validation \\
      --judge=beaver_dam

The first is on the small world that comes with the package, at a reduced list. Every alignment, attack and evaluation
is a run folder of align.py, finetune.py or evaluate.py below --run_dir: re-running continues where it stopped. The
user's task is that of the data; the papers' other tasks and models are a command each.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from absl import app, flags

from experiments import benchmark_memory, common, config_flags, grid_report, panels, presets, published, reports, sweep
from experiments.align import AlignConfig, align
from experiments.config_flags import flag
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.finetune import FinetuneConfig, finetune
from experiments.panels import Panel, Point
from experiments.run import ATTACK_SHARED, EVALUATE_SHARED
from experiments.sweep_report import folder_name
from jaxvaccine import runs, world

ACCURACY_TESTS = ("sst2_test", "agnews_test", "gsm8k_test")
TITLES = {"booster": "Booster (arXiv 2409.01586)", "t_vaccine": "T-Vaccine (arXiv 2410.09760)"}
# Flags that are the same in alignment, attack and evaluation, follow from others, or are what the lists run through.
ALIGN_WITHOUT = ("run_dir", "model", "defense", "base_defense", "seed", "overwrite")
ATTACK_WITHOUT = ("run_dir", "aligned", "poison_ratio", "test_data", "seed", "overwrite", *ATTACK_SHARED)
EVALUATE_WITHOUT = ("run_dir", "model", "trained", "seed", "overwrite", "loss_data", *EVALUATE_SHARED)


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """Flags of reproduce.py beside those of align.py, (attack_) finetune.py and evaluate.py."""

    run_dir: str = flag("", "Folder of the whole reproduction.")
    paper: Literal["booster", "t_vaccine"] = flag("booster", "Whose list and recipes.")
    model: str = flag(world.NAME, "Model: a Hugging Face directory, a hub id, a .gguf file, or the small world.")
    seeds: tuple[str, ...] = flag(("0",), "Seeds; everything is run for each.")

    def __post_init__(self):
        common.require(self, "run_dir", bool(self.run_dir), "a folder")
        common.require(self, "model", bool(self.model), "a directory, a hub id or a .gguf file")
        common.require_numbers(self, "seeds")

    @property
    def folders(self) -> list[str]:
        return [f"seed{seed}" for seed in self.seeds]


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
REDUCED = Values(("0", "0.1", "0.2"), ("100", "500", "1000"), f":steps=0:epochs={panels.WORLD_EPOCHS:g}",
                 ("0", "0.1", "0.2", "0.4"), ("0.03", "0.1", "0.3"), ("1.5", "5.0", "15.0"), ("1", "3", "6"))


def booster_list(values: Values, recipe: Mapping[str, Any]) -> list[Panel]:
    methods = ("sft", "vaccine", "booster", "booster:base_defense=vaccine")
    return [*panels.ratios(methods, values.ratios), *panels.samples(methods, values.counts, values.length),
            panels.over("Weight of the regularizer (0: none)", "lam", values.lam, ("booster",), recipe),
            panels.over("Length of the simulated step", "alpha", values.alpha, ("booster",), recipe)]


def t_vaccine_list(values: Values, recipe: Mapping[str, Any]) -> list[Panel]:
    methods = ("sft", "vaccine", "t_vaccine", "t_vaccine:freeze=released")
    return [*panels.ratios(methods, values.ratios), *panels.samples(methods, values.counts, values.length),
            panels.over("Norm of the perturbation", "rho", values.rho, ("t_vaccine",), recipe),
            panels.over("Active layers S", "layers", values.layers, ("t_vaccine",), recipe),
            Panel("How layers are chosen", "", {"t_vaccine": [
                panels.Point("T-Vaccine", "t_vaccine"),
                panels.Point("uniform probabilities", "t_vaccine:importance=uniform"),
                panels.Point("the most probable layers", "t_vaccine:draw=top")]})]


LISTS = {"booster": booster_list, "t_vaccine": t_vaccine_list}


class Recipes(NamedTuple):
    """Of every defense, its alignment and the attack on it; and the scores of all."""

    align: Mapping[str, AlignConfig]
    attack: Mapping[str, FinetuneConfig]
    scores: EvaluateConfig

    def cell(self, root: Path, method: str, attack: str, seed: int) -> tuple[AlignConfig, FinetuneConfig]:
        """The two runs of a cell.

        Raises:
          ValueError: a setting is not valid.
        """
        defense, folder = method.partition(":")[0], root / f"seed{seed}" / folder_name(method)
        aligned = dataclasses.replace(sweep.variant(self.align[defense], method, "methods", "defense"),
                                      run_dir=str(folder / "aligned"), seed=seed)
        attacked = dataclasses.replace(sweep.variant(self.attack[defense], attack, "attacks"), seed=seed,
                                       run_dir=str(folder / folder_name(attack)), aligned=aligned.run_dir)
        return aligned, attacked

    def score(self, run_dir: str, seed: int) -> dict[str, Any]:
        return evaluate(dataclasses.replace(self.scores, run_dir=f"{run_dir}-scores", model="", trained=run_dir,
                                            seed=seed))


def carry_out(recipes: Recipes, root: Path, method: str, attack: str, seed: int) -> None:
    """Aligns, attacks and scores; writes the cell as sweep.py writes its own, with the intervals of the rates."""
    aligned, attacked = recipes.cell(root, method, attack, seed)
    align(aligned)
    before = recipes.score(aligned.run_dir, seed)
    finetune(attacked)
    after = recipes.score(attacked.run_dir, seed)
    steps = len((Path(attacked.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    runs.write_json(root / f"seed{seed}" / folder_name(method) / f"{folder_name(attack)}.json", {
        "scores": {str(step): {task: [result["score"]] for task, result in results.items()}
                   for step, results in ((0, before), (steps, after))},
        "intervals": {task: result["interval"] for task, result in after.items()}})


class TableCell(NamedTuple):
    """A cell of the paper's main tables."""

    point: Point
    p: str
    n: int


def table_cells(ratios: Panel, counts: Panel, n: int) -> list[TableCell]:
    """The cells of both panels; n: of the attacks over p."""
    over_p = [TableCell(point, point.x, n) for curve in ratios.curves.values() for point in curve]
    over_n = [TableCell(point, panels.ATTACK.partition("=")[2], int(point.x))
              for curve in counts.curves.values() for point in curve]
    return over_p + over_n


def comparison(root: Path, config: ReproduceConfig, cells: Sequence[TableCell]) -> str:
    """Markdown: published, ours, difference and interval of the main tables' cells."""
    figures = {(figure.method, figure.poison_ratio, figure.n): figure for figure in published.TABLES[config.paper]}
    rows = []
    for point, p, n in cells:
        found = grid_report.read_point(root, config.folders, point)
        scores, figure = grid_report.scores_of(found), figures.get((point.method, p, n))
        task = grid_report.accuracy_task(found[0]["intervals"])
        for name, values, of in (("HS", scores.end, "harmful_score"), ("FA", scores.accuracy, task)):
            # Of a single seed there is only the interval over its test prompts.
            low, high = grid_report.interval(values) if len(values) > 1 else found[0]["intervals"][of]
            row = [point.method, p, str(n), name, "", f"{values.mean():.2f}", "", f"{low:.1f}–{high:.1f}", ""]
            if figure:
                number = figure.harmful_score if name == "HS" else figure.accuracy
                row[4], row[6] = f"{number:.2f}", f"{values.mean() - number:+.2f}"
                row[8] = f"{figure.source}: {figure.model}, {figure.task}"
            rows.append(row)
    return reports.table(["method", "p", "n", "%", "published", "ours", "difference", "95% interval of ours", "source"],
                         rows)


def claim(root: Path, config: ReproduceConfig, recipes: Recipes, cells: Sequence[TableCell]) -> str:
    """What the paper's statement in `published.CLAIMS` is here."""
    if config.paper == "booster":
        found = [(cell, grid_report.read_point(root, config.folders, cell.point)) for cell in cells]
        hs = {(cell.point.method, cell.p, cell.n): grid_report.scores_of(of).end.mean() for cell, of in found}
        drop, method, p, n = max((hs[method, p, n] - hs["booster", p, n], method, p, n) for method, p, n in hs
                                 if ("booster", p, n) in hs)
        return f"{drop:.1f} points, against {method} at p = {p}, n = {n}"
    architecture = common.read_architecture(config.model)
    dtype = "float32" if recipes.scores.dtype == "checkpoint" else recipes.scores.dtype
    vaccine, t_vaccine = (sum(benchmark_memory.step_memory(recipes.align[name], dtype, architecture))
                          for name in ("vaccine", "t_vaccine"))
    return f"{100 * (t_vaccine / vaccine - 1):+.2f}% (XLA's buffer assignment of a step, {dtype})"


def reproduce(config: ReproduceConfig, recipes: Recipes, values: Values) -> str:
    """Carries out what has not been carried out yet; returns the report."""
    root = Path(config.run_dir)
    parts = LISTS[config.paper](values, dataclasses.asdict(recipes.align[config.paper]))
    pairs = panels.cells(parts)
    for (method, attack), seed in itertools.product(pairs, config.seeds):
        recipes.cell(root, method, attack, int(seed))  # every setting is checked before the first run
    for seed, (method, attack) in itertools.product(config.seeds, pairs):
        carry_out(recipes, root, method, attack, int(seed))
    cells = table_cells(parts[0], parts[1], recipes.attack["sft"].n)
    statements = [[what, number, claim(root, config, recipes, cells), source]
                  for what, number, source in published.CLAIMS[config.paper]]
    text = "\n".join([
        f"# {TITLES[config.paper]}, on {config.model}\n", "## Published figures and ours\n",
        "Published figures are those with a source that can be cited; a model other than the published one is another "
        "experiment, and the difference then says how far it carries over.\n",
        comparison(root, config, cells),
        reports.table(["statement", "published", "ours", "source"], statements),
        *(grid_report.panel_report(root, root, config.folders, panel, i) for i, panel in enumerate(parts)),
        grid_report.note([config.model], config.seeds)])
    (root / reports.REPORT).write_text(text, encoding="utf-8")
    return text


def read_recipes(config: ReproduceConfig, flag_values: flags.FlagValues = flags.FLAGS) -> Recipes:
    """The published recipes, or the small world's, with the flags that were given.

    Raises:
      ValueError: there is nothing to score HS or FA on, or a flag is not valid.
    """
    on_world = config.model == world.NAME
    read = functools.partial(config_flags.read, flag_values=flag_values)
    aligned, attacked = {}, {}
    for defense in ("sft", "vaccine", config.paper):
        aligned[defense] = read(
            AlignConfig, preset=presets.WORLD_ALIGN if on_world else presets.ALIGN[defense], run_dir="-", seed=0,
            model=config.model, defense=defense, base_defense="sft", overwrite=False)
    shared = {name: getattr(aligned["sft"], name) for name in {*ATTACK_SHARED, *EVALUATE_SHARED}}
    scores = read(
        EvaluateConfig, preset=presets.WORLD_TESTS if on_world else None, run_dir="-", model=config.model, trained="",
        seed=0, loss_data="", overwrite=False, **{name: shared[name] for name in EVALUATE_SHARED})
    common.require(scores, "harmful_test", bool(scores.harmful_test), "harmful prompts for HS")
    common.require(scores, "sst2_test", any(getattr(scores, name) for name in ACCURACY_TESTS),
                   "data for FA, or one of " + ", ".join(f"--{name}" for name in ACCURACY_TESTS[1:]))
    for defense in aligned:
        attacked[defense] = read(
            FinetuneConfig, "attack_", presets.WORLD_ATTACK if on_world else presets.FINETUNE[defense], run_dir="-",
            aligned="-", poison_ratio=0.1, seed=0, test_data=scores.harmful_test, overwrite=False,
            **{name: shared[name] for name in ATTACK_SHARED})
    return Recipes(aligned, attacked, scores)


def main(argv: list[str]) -> None:
    with common.readable_errors("reproduce", argv):
        config = config_flags.read(ReproduceConfig)
        print(reproduce(config, read_recipes(config), REDUCED if config.model == world.NAME else FULL))


if __name__ == "__main__":
    config_flags.define(ReproduceConfig)
    config_flags.define(AlignConfig, without=ALIGN_WITHOUT)
    config_flags.define(FinetuneConfig, "attack_", ATTACK_WITHOUT)
    config_flags.define(EvaluateConfig, without=EVALUATE_WITHOUT)
    app.run(main)
