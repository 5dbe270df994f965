"""The cells of a plan with all seeds of a setting at once, as lanes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxvaccine import data
from jaxvaccine.checkpoints.identity import adapter_identity
from jaxvaccine.checkpoints.peft import load_adapter, save_adapter
from jaxvaccine.checkpoints.resolve import loadable_name
from jaxvaccine.experiment import ablation, inputs, lane_attacks, lanes, layer_choice, memory, results, stage
from jaxvaccine.experiment.align import AlignConfig, batch_sources, load_data, step_of, tokenize
from jaxvaccine.experiment.attack import aligned_prompts, alignment_fisher, attack_sources, count_steps, read_data
from jaxvaccine.experiment.attack_config import AttackAdapter
from jaxvaccine.experiment.attack_rows import Candidates, answer_loss, record, select, take, tokenize_attack
from jaxvaccine.experiment.attack_scores import as_attacked
from jaxvaccine.experiment.budget import budgets
from jaxvaccine.experiment.config import flat
from jaxvaccine.experiment.lane_scores import Scorer
from jaxvaccine.experiment.plan_folder import Context, finish, result_path, say_scores
from jaxvaccine.experiment.plans import (
    align_folder,
    cell_configs,
    errors_of_attack,
    split_method,
)
from jaxvaccine.experiment.results import Cell, Row
from jaxvaccine.json_files import read_json

# Metrics of an alignment that are kept where seeds are trained at once, {measure in the table: metric}, and at every
# how many steps. What is of a step's own batch has another name than what is measured on data for it.
METRICS = {"batch_loss": "loss", "batch_harmful_loss": "harmful_loss",
           "batch_harmful_gradient_norm": "harmful_gradient_norm", "probabilities": "probabilities",
           "active_layers": "active_layers"}
METRICS_EVERY = 5
def lane_cells(context: Context, backbone: str) -> None:
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
                say_scores(context, cells)


def _align_lanes(context: Context, config: AlignConfig, base: stage.Base, tokenizer, scorer: Scorer, backbone: str,
                 method: str, seeds: Sequence[int]) -> lanes.Lanes:
    """Aligned lanes: those of an earlier call, and new ones, which are measured, scored and saved."""
    cells = [Cell(backbone, method, "", seed) for seed in seeds]
    start = new_lanes(config, base, seeds)
    new = [i for i, cell in enumerate(cells) if not result_path(context.root, cell).exists()]
    shared = split_method(method)[0]
    if new and method != shared:  # what the provider does comes after the alignment
        _align_lanes(context, config, base, tokenizer, scorer, backbone, shared, [seeds[i] for i in new])
        for i in new:
            found = read_json(result_path(context.root, cells[i]._replace(method=shared)))
            finish(context, cells[i], [{**row, "method": method} for row in found["rows"]], found["answers"],
                   **{name: found[name] for name in ("accounts", "shared", "adapter", layer_choice.ACTIVE_STEPS)
                      if name in found})
        new = []
    if new:
        taken = start._replace(adapters=lanes.stack([lanes.take(start.adapters, i) for i in new]))
        _train_aligned(context, config, taken, tokenizer, scorer, [cells[i] for i in new])
    return with_aligned(start, context.root, cells)


def new_lanes(config: AlignConfig, base: stage.Base, seeds: Sequence[int]) -> lanes.Lanes:
    """Lanes with new adapters, before their alignment."""
    part = config.model
    if lanes.take_turns():  # then one lane's memory is what is taken
        length = data.bucket_length(config.data.max_length, config.data.bucket)
        step = memory.with_remat(part.remat, step_of(config, base.model, length))
        part = dataclasses.replace(part, remat=step.model.remat)
    return lanes.fresh(base, config.adapter.lora(), part, seeds)


def with_aligned(of: lanes.Lanes, root: Path, cells: Sequence[Cell]) -> lanes.Lanes:
    """The lanes with the adapters that a plan's folder has of these cells."""
    return of._replace(adapters=lanes.stack([
        load_adapter(inputs.adapter_dir(align_folder(root, cell)), of.model) for cell in cells]))


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
    active = metrics.get(layer_choice.ACTIVE_LAYERS)
    scores, answers = scorer(aligned, seeds)
    budget = budgets(config.training, config.adapter, last)[-1]
    add(last, {results.BUDGET: np.full(len(cells), budget)})
    for i, cell in enumerate(cells):
        folder = inputs.adapter_dir(align_folder(context.root, cell))
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(lanes.take(aligned.adapters, i), aligned.model, folder, loadable_name(config.model.model),
                     config.model.revision)
        scored = results.score_rows(cell, "alignment", last, scores[i], context.settings.by_category)
        finish(context, cell, rows[i] + scored,
                {str(last): answers} if i == 0 else None, **record, adapter=adapter_identity(folder),
               **({} if active is None else {
                   layer_choice.ACTIVE_STEPS: layer_choice.count_active(active[:, i]).tolist()}))


def _attack_lanes(context: Context, aligned: lanes.Lanes, cells: Sequence[Cell], tokenizer, scorer: Scorer) -> None:
    """Attacks every lane with poisoned data of its own seed, and writes the cells."""
    align_config, config = cell_configs(context.settings, context.root, cells[0])
    adapter = config.adapter.resolve(flat(align_config), config.method, config.ablation)
    prompts = {name: stage.prompts_of(rows) for name, rows in load_data(
        align_config.data, align_config.method).items()}
    sources, for_fisher, records, candidates = [], [], [], []
    scorer = scorer.of(as_attacked(scorer.config, config))
    for cell in cells:
        read, poisoned = read_data(config, cell.seed, aligned_prompts(prompts), tokenizer)
        tokenized, of = tokenize_attack(tokenizer, read, poisoned, config.data, align_config.data.form)
        candidates.append(of)
        records.append(scorer.beside(
            stage.training_record(read, tokenized, poisoned.accounts, poisoned.shared), prompts))
        of_steps, of_fisher = attack_sources(config, tokenized)
        sources.append(of_steps)
        for_fisher.append(of_fisher)
    seeds = [cell.seed for cell in cells]
    # All harmful prompts, which are those of every seed.
    asked = ablation.encode(tokenizer, config.ablation, poisoned.harmful, config.data.protocol, config.data.form,
                            config.data.bad_rows)
    start = lane_attacks.begin(aligned, adapter, config.ablation, asked, seeds)
    fishers = lanes.stack([
        alignment_fisher(start.model, *start.lane(i), of, config.training.batch_size, config.data.bucket, seed)
        for i, (of, seed) in enumerate(zip(for_fisher, seeds, strict=True))]) if config.takes_fisher else None
    if config.data.user_rows == "similar":
        _choose_rows(start, candidates, config.training.batch_size, sources, records)
    last = count_steps(config, sources[0])
    probe = context.probes.attack and context.probes.attack(align_config, config, tokenizer, seeds)
    found: list[list[Row]] = [[] for _ in cells]
    budget, answers = budgets(config.training, adapter.sites(), last), {}

    def observe(step: int, of: lanes.Lanes) -> None:
        measured = probe(step, of) if probe and (step in context.plan.score_steps or step == last) else {}
        for i, cell in enumerate(cells):
            found[i].extend(results.measured_rows(cell, "attack", step, {k: v[i] for k, v in measured.items()}))
        # Before the first step it is the aligned model, which has been scored, unless there is no step.
        if step == last or (step and step in context.plan.score_steps):
            scores, answers[str(step)] = scorer(lane_attacks.result(of, config.ablation, asked), seeds)
            for i, cell in enumerate(cells):
                found[i].extend(results.score_rows(cell, "attack", step, scores[i], context.settings.by_category))
                if adapter.trains == "adapter":
                    found[i].extend(results.measured_rows(cell, "attack", step, {results.BUDGET: budget[step]}))

    if adapter.trains == "nothing":
        observe(0, start)
    else:
        layers = _layers(context, adapter, cells, start.model.config.num_layers)
        lanes.train(start, config.method, config.training, config.data.bucket, sources, seeds, layers, observe,
                    config.run.progress, f"{cells[0].method} {cells[0].attack}", config.objective, fishers)
    for i, cell in enumerate(cells):
        chosen = layer_choice.of_alignment(adapter.only_layers)
        finish(context, cell, found[i], answers if i == 0 else None, **records[i],
               **({"layers": layer_choice.numbers(layers[i])} if chosen else {}))


def _choose_rows(start: lanes.Lanes, candidates: Sequence[Candidates], batch_size: int, sources: list[dict[str, Any]],
                 records: list[dict[str, Any]]) -> None:
    """Puts the rows that are most like harmful ones, to each lane's model, in the place of its candidates."""
    loss_fn = answer_loss(start.model)
    for i, of in enumerate(candidates):
        selection = select(of, start.model, *start.trained(i), loss_fn)
        sources[i]["user"] = take(of.rows, selection.rows), batch_size
        selected = record(of, selection)
        records[i] |= {"selected": selected, "accounts": {**records[i]["accounts"], **selected["accounts"]}}


def _layers(context: Context, adapter: AttackAdapter, cells: Sequence[Cell], num_layers: int) -> np.ndarray | None:
    """Where each lane trains, [N, L] bool, since every seed's alignment had layers of its own active; None for all."""
    if adapter.only_layers is None:
        return None
    with errors_of_attack(cells[0].attack):
        masks = []
        for cell in cells:
            of = read_json(result_path(context.root, cell._replace(attack=""))).get(layer_choice.ACTIVE_STEPS)
            masks.append(adapter.layer_mask(num_layers, None if of is None else np.array(of)))
    return np.stack(masks)
