"""The one way to carry out a plan: cell by cell, or all seeds of a setting at once as lanes.

Both write the same folder: <backbone>/<method>/seed<k>/aligned/ with the aligned adapter, beside it aligned.json and a
file <attack>.json a cell with its rows of the table of results, and at the top results.csv with all rows. Cell by cell,
aligned/ and <attack>/ are run folders of `align` and `attack`, with their scores beside them. Re-running carries out
what is not there yet."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxvaccine import data
from jaxvaccine.checkpoints.identity import adapter_identity
from jaxvaccine.checkpoints.peft import load_adapter, save_adapter
from jaxvaccine.checkpoints.resolve import loadable_name
from jaxvaccine.experiment import faced, inputs, lanes, memory, recipes, results, runs, stage
from jaxvaccine.experiment.align import AlignConfig, align, batch_sources, load_data, step_of, tokenize
from jaxvaccine.experiment.attack import AttackConfig, aligned_prompts, attack, read_data
from jaxvaccine.experiment.budget import budgets
from jaxvaccine.experiment.checks import MadeOf, check_plan
from jaxvaccine.experiment.config import flat, names
from jaxvaccine.experiment.evaluate import EvaluateConfig, evaluate
from jaxvaccine.experiment.judging import JudgePart
from jaxvaccine.experiment.lane_scores import Scorer
from jaxvaccine.experiment.parts import split_operational
from jaxvaccine.experiment.plans import (
    ALIGNED,
    AS_IT_COMES,
    Plan,
    Settings,
    align_folder,
    attack_folder,
    cell_configs,
    folder_name,
    split_method,
)
from jaxvaccine.experiment.results import Cell, Row
from jaxvaccine.json_files import read_json, read_json_object, write_json

# Metrics of an alignment that are kept where seeds are trained at once, {measure in the table: metric}, and at every
# how many steps. What is of a step's own batch has another name than what is measured on data for it.
METRICS = {"batch_loss": "loss", "batch_harmful_loss": "harmful_loss",
           "batch_harmful_gradient_norm": "harmful_gradient_norm", "probabilities": "probabilities",
           "active_layers": "active_layers"}
METRICS_EVERY = 5
# Fields of the tests of a user's task.
USERS_TASKS = ("sst2_test", "agnews_test", "gsm8k_test", "alpaca_eval_test")

Measure = Callable[[int, lanes.Lanes], Mapping[str, np.ndarray]]


class Probes(NamedTuple):
    """What a study measures of lanes on the way, beside scores: (step, lanes) -> {measure: [N] or [N, L]}.

    alignment: (config, tokenizer, seeds) -> such a measure, taken after every `every` steps and at both ends.
    attack: the same of an attack, taken where a model is scored.
    check: (alignment, attack) of every cell, before the first is carried out; raises for what can't be measured.
    """

    alignment: Callable[[AlignConfig, Any, Sequence[int]], Measure] | None = None
    attack: Callable[[AlignConfig, AttackConfig, Any, Sequence[int]], Measure] | None = None
    every: int = 0
    check: Callable[[AlignConfig, AttackConfig | None], None] = lambda aligned, attacked: None


class Context(NamedTuple):
    """What is the same for all cells."""

    plan: Plan
    settings: Settings
    root: Path
    made_of: Mapping[Cell, MadeOf]
    probes: Probes
    written: Callable[[Path], None]  # called with every folder that has something new to report
    say: Callable[[str], None]


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
             "scores": {name: value for name, value in scores.items() if as_lanes or name not in names(JudgePart)}}
    runs.open_run(root, "run", fixed, {}, overwrite=overwrite)
    for cell, inputs_now in made_of.items():
        check_same(root, cell, inputs_now)
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
        carry = _lanes if as_lanes else _one_by_one
        carry(context, backbone)


def _fixed(by_defense: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What may not differ from one call to the next."""
    return {defense: split_operational(values)[0] for defense, values in by_defense.items()}


def collect(root: Path, plan: Plan) -> None:
    """Writes the table of all cells of the plan that are there."""
    rows: list[Row] = []
    for backbone in plan.backbones:
        paths = [result_path(root, Cell(backbone, AS_IT_COMES, "", 0))]
        for method in plan.methods:
            for seed in plan.seeds:
                cells = [Cell(backbone, method, text, seed) for text in ("", *plan.of_method(method))]
                paths += [result_path(root, cell) for cell in cells]
        rows += [row for path in paths if path.exists() for row in read_json(path)["rows"]]
    results.write(root / results.TABLE, results.table(rows))


def result_path(root: Path, cell: Cell) -> Path:
    """Of a cell's rows; of the aligned model's, if the cell's attack is ""."""
    folder = attack_folder(root, cell)
    if cell.method == AS_IT_COMES:
        return root / folder_name(cell.backbone) / f"{AS_IT_COMES}.json"
    return folder / f"{ALIGNED}.json" if not cell.attack else folder.with_name(f"{folder.name}.json")


def check_same(root: Path, cell: Cell, made_of: MadeOf) -> None:
    """Raises FileExistsError if a cell's result, if it is there, is that of other inputs, or its adapter another."""
    path = result_path(root, cell)
    if not path.exists():
        return
    found, now = read_json_object(path), {"inputs": made_of}
    if "adapter" in found:
        now["adapter"] = adapter_identity(inputs.adapter_dir(align_folder(root, cell)))
    if changed := runs.differences({name: found.get(name) for name in now}, now, "found", "expected"):
        raise FileExistsError(f"{path}: holds a result of other inputs than there are now; choose another folder, or "
                              "--overwrite to delete it. " + "; ".join(changed))


def _finish(context: Context, cell: Cell, rows: Sequence[Row], answers: Mapping[str, Any] | None = None, **more: Any
            ) -> None:
    """Writes a cell's file. more: the accounts of what the run and the tests read, and what of it is shared."""
    path = result_path(context.root, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"rows": list(rows), "answers": answers or {}, "inputs": context.made_of[cell], **more})
    collect(context.root, context.plan)


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
    rows = results.score_rows(cell, stage_name, step, found) + results.measured_rows(cell, stage_name, step, measured)
    path = result_path(context.root, cell)
    new = not path.exists() or read_json(path)["rows"] != rows
    if new:
        new_folders = (folder, scored) if trained else (scored,)
        for each in new_folders:
            context.written(each)
        _finish(context, cell, rows, **_recorded(*new_folders))
    return new


def _scores_folder(run_dir: Path) -> Path:
    return run_dir.with_name(run_dir.name + "-scores")


def _recorded(*folders: Path) -> dict[str, Any]:
    """What runs have recorded of their data's rows and of what they share."""
    data_of = [runs.read_config(folder)["data"] for folder in folders]
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
                folder, adapter = attack(attacked), attacked.adapter.resolve(flat(aligned), attacked.method).sites()
                steps = _steps_done(folder)
                if _score(context, cell, "attack", steps, folder, trained=str(folder),
                          measured={results.BUDGET: budgets(attacked.training, adapter, steps)[-1]},
                          tests=_tests(context.settings, attacked)):
                    _say(context, [cell])


def _tests(settings: Settings, attacked: AttackConfig) -> EvaluateConfig:
    """The plan's evaluation, of FA on the user's own task alone where the settings want that and have a test of it."""
    scores, kinds = settings.scores, recipes.kinds(attacked.data.user_data)
    own = [name for name in USERS_TASKS if name.removesuffix("_test") in kinds and getattr(scores.tests, name)]
    if not (settings.own_task and own):
        return scores
    others = {name: "" for name in USERS_TASKS if name not in own}
    return dataclasses.replace(scores, tests=dataclasses.replace(scores.tests, **others))


def _steps_done(folder: Path) -> int:
    return runs.read_config(folder)["steps"]


def _say(context: Context, cells: Sequence[Cell]) -> None:
    scores: dict[str, list[str]] = {}
    for cell in cells:
        rows = read_json(result_path(context.root, cell))["rows"]
        last = max(row["step"] for row in rows)
        for row in rows:
            if row["step"] == last and row.get("layer") is None:
                scores.setdefault(row["measure"], []).append(f"{row['value']:.4g}")
    context.written(context.root)
    seeds = ",".join(str(cell.seed) for cell in cells)
    context.say(f"{cells[0].backbone} {cells[0].method} {cells[0].attack}, seed {seeds}: "
                + "; ".join(f"{measure} {', '.join(values)}" for measure, values in scores.items()))


def _lanes(context: Context, backbone: str) -> None:
    """All seeds of a method at once, and then of every attack on it."""
    tokenizer = scorer = None
    for method in context.plan.methods:
        of_method = [Cell(backbone, method, text, seed) for text in ("", *context.plan.of_method(method))
                     for seed in context.plan.seeds]
        missing = [cell for cell in of_method if not result_path(context.root, cell).exists()]
        if not missing:
            continue
        if scorer is None:
            tokenizer = stage.load_tokenizer(backbone, context.settings.scores.model.revision)
            scorer = Scorer(context.settings.scores, tokenizer)
        seeds = list(dict.fromkeys(cell.seed for cell in missing))
        config, _ = cell_configs(context.settings, context.root, missing[0])
        # The same again, unless a method has another dtype or quantisation.
        base = stage.load_base(backbone, config.model.dtype, revision=config.model.revision,
                               quantisation=config.model.quantisation)
        aligned = _align_lanes(context, config, base, tokenizer, scorer, backbone, method, seeds)
        for text in dict.fromkeys(cell.attack for cell in missing):
            cells = [cell for cell in missing if cell.attack == text]
            if text:
                attacked = lanes.stack([lanes.take(aligned.adapters, seeds.index(cell.seed)) for cell in cells])
                _attack_lanes(context, aligned._replace(adapters=attacked), cells, tokenizer, scorer)
                _say(context, cells)


def _align_lanes(context: Context, config: AlignConfig, base: stage.Base, tokenizer, scorer: Scorer, backbone: str,
                 method: str, seeds: Sequence[int]) -> lanes.Lanes:
    """Aligned lanes: those of an earlier call, and new ones, which are measured, scored and saved."""
    cells = [Cell(backbone, method, "", seed) for seed in seeds]
    part = config.model
    if lanes.take_turns():  # then one lane's memory is what is taken
        length = data.bucket_length(config.data.max_length, config.data.bucket)
        step = memory.with_remat(part.remat, step_of(config, base.model, length))
        part = dataclasses.replace(part, remat=step.model.remat)
    start = lanes.fresh(base, config.adapter.lora(), part, seeds)
    new = [i for i, cell in enumerate(cells) if not result_path(context.root, cell).exists()]
    shared = split_method(method)[0]
    if new and method != shared:  # what the provider does comes after the alignment
        _align_lanes(context, config, base, tokenizer, scorer, backbone, shared, [seeds[i] for i in new])
        for i in new:
            found = read_json(result_path(context.root, cells[i]._replace(method=shared)))
            _finish(context, cells[i], [{**row, "method": method} for row in found["rows"]], found["answers"],
                    **{name: found[name] for name in ("accounts", "shared", "adapter") if name in found})
        new = []
    if new:
        taken = start._replace(adapters=lanes.stack([lanes.take(start.adapters, i) for i in new]))
        _train_aligned(context, config, taken, tokenizer, scorer, [cells[i] for i in new])
    return start._replace(adapters=lanes.stack([
        load_adapter(inputs.adapter_dir(align_folder(context.root, cell)), start.model) for cell in cells]))


def _train_aligned(context: Context, config: AlignConfig, start: lanes.Lanes, tokenizer, scorer: Scorer,
                   cells: Sequence[Cell]) -> None:
    seeds = [cell.seed for cell in cells]
    examples = load_data(config.data, config.method)
    tokenized = tokenize(tokenizer, examples, config.data)
    record = scorer.beside(stage.training_record(examples, tokenized))
    sources = batch_sources(config.method, tokenized, config.training.batch_size, config.data.harmful_batch_size)
    last = stage.count_steps(config.training, sources)
    probe = context.probes.alignment and context.probes.alignment(config, tokenizer, seeds)
    rows: list[list[Row]] = [[] for _ in cells]

    def add(step: int, measured: Mapping[str, np.ndarray]) -> None:
        for i, cell in enumerate(cells):
            rows[i] += results.measured_rows(cell, "alignment", step, {k: v[i] for k, v in measured.items()})

    def observe(step: int, of: lanes.Lanes) -> None:
        if step % context.probes.every == 0 or step == last:
            add(step, probe(step, of))

    aligned, metrics = lanes.train(start, config.method, config.training, config.data.bucket, [sources] * len(cells),
                                   seeds, observe=observe if probe else None, progress=config.run.progress,
                                   description=f"align {cells[0].method}")
    for step in range(0, last, METRICS_EVERY):
        add(step, {measure: metrics[name][step].astype(float) for measure, name in METRICS.items() if name in metrics})
    scores, answers = scorer(aligned, seeds)
    budget = budgets(config.training, config.adapter, last)[-1]
    add(last, {results.BUDGET: np.full(len(cells), budget)})
    for i, cell in enumerate(cells):
        folder = inputs.adapter_dir(align_folder(context.root, cell))
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(lanes.take(aligned.adapters, i), aligned.model, folder, loadable_name(config.model.model),
                     config.model.revision)
        _finish(context, cell, rows[i] + results.score_rows(cell, "alignment", last, scores[i]),
                {str(last): answers} if i == 0 else None, **record, adapter=adapter_identity(folder))


def _attack_lanes(context: Context, aligned: lanes.Lanes, cells: Sequence[Cell], tokenizer, scorer: Scorer) -> None:
    """Attacks every lane with poisoned data of its own seed, and writes the cells."""
    align_config, config = cell_configs(context.settings, context.root, cells[0])
    adapter = config.adapter.resolve(flat(align_config), config.method)
    prompts = {name: stage.prompts_of(rows) for name, rows in load_data(
        align_config.data, align_config.method).items()}
    sources, records = [], []
    for cell in cells:
        read, poisoned = read_data(config, cell.seed, aligned_prompts(prompts), tokenizer)
        tokenized = tokenize(tokenizer, read, config.data)
        records.append(scorer.beside(
            stage.training_record(read, tokenized, poisoned.accounts, poisoned.shared), prompts))
        sources.append({name: (rows, config.training.batch_size) for name, rows in tokenized.items()})
    seeds = [cell.seed for cell in cells]
    last = stage.count_steps(config.training, sources[0])
    start = lanes.merged(aligned, adapter.sites().lora(), seeds) if adapter.adapter == "new" else aligned
    probe = context.probes.attack and context.probes.attack(align_config, config, tokenizer, seeds)
    found: list[list[Row]] = [[] for _ in cells]
    budget, answers = budgets(config.training, adapter.sites(), last), {}

    def observe(step: int, of: lanes.Lanes) -> None:
        measured = probe(step, of) if probe and (step in context.plan.score_steps or step == last) else {}
        for i, cell in enumerate(cells):
            found[i].extend(results.measured_rows(cell, "attack", step, {k: v[i] for k, v in measured.items()}))
        # Before the first step it is the aligned model, which has been scored.
        if step and (step in context.plan.score_steps or step == last):
            scores, answers[str(step)] = scorer(of, seeds)
            for i, cell in enumerate(cells):
                found[i].extend(results.score_rows(cell, "attack", step, scores[i]))
                found[i].extend(results.measured_rows(cell, "attack", step, {results.BUDGET: budget[step]}))

    lanes.train(start, config.method, config.training, config.data.bucket, sources, seeds,
                adapter.layer_mask(start.model.config.num_layers), observe, config.run.progress,
                f"{cells[0].method} {cells[0].attack}")
    for i, cell in enumerate(cells):
        _finish(context, cell, found[i], answers if i == 0 else None, **records[i])
