"""The one way to carry out a plan: cell by cell, or all seeds of a setting at once as lanes.

Both write the same folder: <backbone>/<method>/seed<k>/aligned/ with the aligned adapter, beside it aligned.json and a
file <attack>.json a cell with its rows of the table of results, and at the top results.csv with all rows. Cell by cell,
aligned/ and <attack>/ are run folders of `align` and `attack`, with their scores beside them. Re-running carries out
what is not there yet."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxvaccine.experiment import faced, recipes, results, runs
from jaxvaccine.experiment.align import align
from jaxvaccine.experiment.attack import attack
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.attack_rows import recorded_accounts
from jaxvaccine.experiment.attack_scores import as_attacked
from jaxvaccine.experiment.budget import budgets
from jaxvaccine.experiment.checks import check_plan
from jaxvaccine.experiment.config import flat, names
from jaxvaccine.experiment.evaluate import evaluate
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.judging import JudgePart, probe
from jaxvaccine.experiment.lane_cells import lane_cells
from jaxvaccine.experiment.parts import split_operational
from jaxvaccine.experiment.plan_folder import Context, Probes, check_same, collect, finish, result_path, say_scores
from jaxvaccine.experiment.plans import AS_IT_COMES, Plan, Settings, cell_configs, folder_name
from jaxvaccine.experiment.results import Cell
from jaxvaccine.json_files import read_json, write_json

# Fields of the tests of a user's task.
USERS_TASKS = ("sst2_test", "agnews_test", "gsm8k_test", "alpaca_eval_test")


def carry_out(plan: Plan, settings: Settings, root: Path, *, as_lanes: bool = False, score_backbones: bool = False,
              probes: Probes = Probes(), overwrite: bool = False, written: Callable[[Path], None] = lambda folder: None,
              say: Callable[[str], None] = print) -> None:
    """Carries out the cells of the plan that are not there yet; the table of results grows with every one.

    Args:
      plan: what to go through. It may grow from one call to the next, in the same folder.
      settings: what its cells start from; the same in every call.
      root: the plan's folder.
      as_lanes: train all seeds of a setting at once, scored along the attack at the plan's score_steps; for models of
        which many fit. Else every run is a folder that can be continued.
      score_backbones: score the backbones as they come too.
      probes: what else is measured of lanes.
      overwrite: delete an earlier plan's folder first.
      written: told of every run folder that has been finished, and of `root` whenever its table has grown by an attack:
        to write their reports.
      say: told of every cell.

    Raises:
      FieldError, ValueError: a cell that is not valid, before the first is carried out.
      FileExistsError: the folder holds a plan with other settings.
    """
    made_of = check_plan(plan, settings, root, as_lanes, probes.check)
    of_attack = {name: {**settings.new_adapter.get(name, {}), **values} for name, values in settings.attack.items()}
    # The backbones are in the cells' paths. Judging again takes the answers, which lanes do not keep.
    scores = {**split_operational(flat(settings.scores))[0], "model": ""}
    fixed = {"align": _fixed(settings.align), "attack": _fixed(of_attack), "as_lanes": as_lanes,
             "scores": {name: value for name, value in scores.items() if as_lanes or name not in names(JudgePart)},
             **({"by_category": True} if as_lanes and settings.by_category else {})}
    runs.open_run(root, "run", fixed, {}, overwrite=overwrite)
    for cell, inputs_now in made_of.items():
        check_same(root, cell, inputs_now)
    if any(not result_path(root, cell).exists() for cell in made_of if score_backbones or cell.method != AS_IT_COMES):
        probe(settings.scores.judge, bool(settings.scores.tests.harmful_test))
    # Of this call, whatever an earlier one recorded.
    write_json(root / runs.CONFIG, {**runs.read_config(root), "operational": {
        "plan": dataclasses.asdict(plan), "judge": flat(settings.scores.judge), "paper": settings.paper,
        "of_paper": {method: settings.in_paper(method) for method in plan.methods},
        "faced": faced.of_plan(plan, settings, root)}})
    context = Context(plan, settings, root, made_of, probes, written, say)
    collect(root, plan)
    for backbone in plan.backbones:
        if score_backbones:
            _score_backbone(context, backbone)
        carry = lane_cells if as_lanes else _one_by_one
        carry(context, backbone)


def _fixed(by_defense: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What may not differ from one call to the next."""
    return {defense: split_operational(values)[0] for defense, values in by_defense.items()}


def _score_backbone(context: Context, backbone: str) -> None:
    cell = Cell(backbone, AS_IT_COMES, "", 0)
    _score(context, cell, "backbone", 0, context.root / folder_name(backbone) / AS_IT_COMES, model=backbone)


def _score(context: Context, cell: Cell, stage_name: str, step: int, folder: Path, model: str = "", trained: str = "",
           measured: Mapping[str, Any] = MappingProxyType({}), tests: EvaluateConfig | None = None) -> bool:
    """Scores what is in a folder; whether that has changed the cell's result. measured: what else is known of it."""
    scores, scored = tests or context.settings.scores, _scores_folder(folder)
    # A run has its own of both.
    own = {} if model else {"revision": "", "quantisation": "none"}
    found = evaluate(dataclasses.replace(
        scores, model=dataclasses.replace(scores.model, model=model, trained=trained, **own),
        run=dataclasses.replace(scores.run, run_dir=str(scored), seed=cell.seed, overwrite=False)))
    rows = (results.score_rows(cell, stage_name, step, found, context.settings.by_category)
            + results.measured_rows(cell, stage_name, step, measured))
    path = result_path(context.root, cell)
    new = not path.exists() or read_json(path)["rows"] != rows
    if new:
        new_folders = (folder, scored) if trained else (scored,)
        for each in new_folders:
            context.written(each)
        finish(context, cell, rows, **_recorded(*new_folders))
    return new


def _scores_folder(run_dir: Path) -> Path:
    return run_dir.with_name(run_dir.name + "-scores")


def _recorded(*folders: Path) -> dict[str, Any]:
    """What runs have recorded of their data's rows and of what they share."""
    data_of = [{**runs.read_config(folder)["data"], "accounts": recorded_accounts(folder)} for folder in folders]
    return {name: {key: value for of in data_of for key, value in of[name].items()} for name in ("accounts", "shared")}


def _one_by_one(context: Context, backbone: str) -> None:
    """A seed's runs together, so that a plan that is interrupted has whole seeds.

    What has finished is gone through too: its run folders compare what they were made of, and take nothing else."""
    for seed in context.plan.seeds:
        for method, attack_text in context.plan.pairs:
            cell = Cell(backbone, method, attack_text, seed)
            aligned, attacked = cell_configs(context.settings, context.root, cell)
            folder, adapter = align(aligned), aligned.adapter
            steps = _steps_done(folder)
            _score(context, cell._replace(attack=""), "alignment", steps, folder, trained=str(folder),
                   measured={results.BUDGET: budgets(aligned.training, adapter, steps)[-1]})
            if attacked:
                folder, adapter = attack(attacked), attacked.adapter.resolve(
                    flat(aligned), attacked.method, attacked.ablation)
                steps = _steps_done(folder)
                budget = ({results.BUDGET: budgets(attacked.training, adapter.sites(), steps)[-1]}
                          if adapter.trains == "adapter" else {})
                if _score(context, cell, "attack", steps, folder, trained=str(folder), measured=budget,
                          tests=_tests(context.settings, attacked)):
                    say_scores(context, [cell])


def _tests(settings: Settings, attacked: AttackConfig) -> EvaluateConfig:
    """The plan's evaluation of an attacked model, of FA on the user's own task alone where the settings want that and
    have a test of it."""
    scores, kinds = as_attacked(settings.scores, attacked), recipes.kinds(attacked.data.user_data)
    own = [name for name in USERS_TASKS if name.removesuffix("_test") in kinds and getattr(scores.tests, name)]
    if not (settings.own_task and own):
        return scores
    others = {name: "" for name in USERS_TASKS if name not in own}
    return dataclasses.replace(scores, tests=dataclasses.replace(scores.tests, **others))


def _steps_done(folder: Path) -> int:
    return runs.read_config(folder)["steps"]
