"""Everything that can be known of a plan before its first step: its cells' settings, files, data, overlaps; and what
each cell is made of."""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxvaccine.evaluation.tasks import HARMFUL_SCORE, check_examples
from jaxvaccine.experiment import inputs, layer_choice, runs, stage
from jaxvaccine.experiment.ablation import NoAblation, encode, load_harmless
from jaxvaccine.experiment.align import AlignConfig, AlignmentData, Examples, check_layers, load_data, tokenize
from jaxvaccine.experiment.attack import aligned_prompts, read_data
from jaxvaccine.experiment.attack_config import AttackConfig, AttackData
from jaxvaccine.experiment.attack_rows import tokenize_attack
from jaxvaccine.experiment.attack_scores import as_attacked
from jaxvaccine.experiment.config import flat, require
from jaxvaccine.experiment.evaluate import accounts_of_tests, check_unseen
from jaxvaccine.experiment.evaluate_config import LOSS
from jaxvaccine.experiment.judging import check_prompts, judge_record
from jaxvaccine.experiment.leaks import check_leaks
from jaxvaccine.experiment.parts import check_form, check_prefill
from jaxvaccine.experiment.plans import AS_IT_COMES, Plan, Settings, cell_configs, errors_of_attack
from jaxvaccine.experiment.recipes import fewer_than_published
from jaxvaccine.experiment.results import Cell

MadeOf = dict[str, Any]


def check_plan(plan: Plan, settings: Settings, root: Path, as_lanes: bool,
               check: Callable[[AlignConfig, AttackConfig | None], None]) -> dict[Cell, MadeOf]:
    """{cell: the hashes of what it is made of}, of all cells, of attack "" too, and of every backbone as it comes.

    check: of a study, of every cell.

    Raises:
      FieldError, ValueError, FileNotFoundError: what the runs of a cell would refuse before their first step.
    """
    require(not (as_lanes and settings.scores.tests.alpaca_eval_test), "alpaca_eval_test",
            settings.scores.tests.alpaca_eval_test, "none where many seeds are trained at once")
    require(not as_lanes or len(settings.scores.judge.panel()) == 1, "judge", settings.scores.judge.judge,
            "one judge where many seeds are trained at once: a panel needs answers that are kept")
    configs = {cell: check_cell(settings, root, cell, as_lanes, check)
               for backbone in plan.backbones for method, text in plan.pairs for seed in plan.seeds
               for cell in [Cell(backbone, method, text, seed)]}
    tests = settings.scores.tests.load()
    for task, rows in tests.items():
        if task != LOSS:
            check_examples(task, rows)
    check_prompts(settings.scores.judge, tests.get(HARMFUL_SCORE, ()))
    judge_record(settings.scores.judge)
    of_tests, made_of = _hashes(tests), {}
    # Cells share most of what they read.
    tokenizer, model = functools.cache(stage.load_tokenizer), functools.cache(inputs.of_model)

    @_once
    def aligned_on(config: AlignConfig, part: AlignmentData, batches: tuple[str, ...]
                   ) -> tuple[Examples, dict[str, list[str]]]:
        examples = load_data(part, config.method)
        return examples, {name: stage.prompts_of(rows) for name, rows in examples.items()}

    @_once
    def alignment(config: AlignConfig, part: AlignmentData, batches: tuple[str, ...], *of_model: str) -> dict[str, str]:
        examples, _ = aligned_on(config, part, batches)
        check_form(tokenizer(*of_model), part.form)
        tokenize(tokenizer(*of_model), examples, part)
        return _hashes(examples)

    @_once
    def attack(of: tuple[str, AlignConfig, AttackConfig], part: AttackData, reads: tuple[str, ...], seed: int,
               ablation: NoAblation, aligned_part: AlignmentData, aligned_batches: tuple[str, ...], *of_model: str
               ) -> dict[str, str]:
        text, aligned, attacked = of
        _, known = aligned_on(aligned, aligned_part, aligned_batches)
        if attacked.data.form != aligned_part.form:
            with errors_of_attack(text):
                check_form(tokenizer(*of_model), attacked.data.form)
        read, poisoned = read_data(attacked, seed, aligned_prompts(known), tokenizer(*of_model))
        tokenize_attack(tokenizer(*of_model), read, poisoned, part, aligned_part.form)
        encode(tokenizer(*of_model), ablation, poisoned.harmful, part.protocol, part.form, part.bad_rows)
        read = {**read, **load_harmless(ablation, part.protocol, part.bad_rows)}
        asked = as_attacked(settings.scores, attacked)
        accounts_of_tests(tokenizer(*of_model), tests, asked.tests)
        with errors_of_attack(text):
            check_prefill(tokenizer(*of_model), attacked.data.prefill, part.form)
        check_unseen(tests, {f"{name} data of {text}": stage.prompts_of(rows) for name, rows in read.items()},
                     settings.scores.tests.protocol)
        return _hashes({**read, "harmful": poisoned.harmful})

    known: dict[str, set[str]] = {}
    few = set()
    for cell, (aligned, _) in configs.items():
        examples, prompts_of = aligned_on(aligned, aligned.data, tuple(aligned.method.batches))
        for name, prompts in prompts_of.items():
            known.setdefault(f"{name} data of {flat(aligned)['defense']}", set()).update(prompts)
        if settings.paper:
            few.add(fewer_than_published(settings.paper, settings.in_paper(cell.method),
                                         {name: len(rows) for name, rows in examples.items()}))
    for text in sorted(filter(None, few)):
        logging.warning("%s", text)
    check_leaks(known, [attacked for _, attacked in configs.values() if attacked], tests,
                settings.scores.tests.protocol)
    for backbone in plan.backbones:
        of_model = backbone, settings.scores.model.revision
        accounts_of_tests(tokenizer(*of_model), tests, settings.scores.tests)
        check_prefill(tokenizer(*of_model), settings.scores.generation.prefill, settings.scores.tests.form)
        made_of[Cell(backbone, AS_IT_COMES, "", 0)] = {"model": model(*of_model), "tests": of_tests}
    for cell, (aligned, attacked) in configs.items():
        of_model = cell.backbone, aligned.model.revision
        stage.loaded_dtype(cell.backbone, aligned.model.dtype, aligned.model.revision)
        read = aligned.data, tuple(aligned.method.batches)
        before = {"model": model(*of_model), "tests": of_tests, "alignment": alignment(aligned, *read, *of_model)}
        made_of[cell._replace(attack="")] = before
        if attacked:
            made_of[cell] = {**before, "attack": attack(
                (cell.attack, aligned, attacked), attacked.data, attacked.reads, cell.seed, attacked.ablation,
                *read, *of_model)}
    return made_of


def check_cell(settings: Settings, root: Path, cell: Cell, as_lanes: bool,
               check: Callable[[AlignConfig, AttackConfig | None], None] = lambda aligned, attacked: None
               ) -> tuple[AlignConfig, AttackConfig | None]:
    """A cell's configs, which its model can carry out; what its data are is not looked at.

    Raises:
      FieldError: they are not valid, or the model can't.
    """
    aligned, attacked = cell_configs(settings, root, cell)
    architecture = stage.read_architecture(cell.backbone, aligned.model.revision)
    check_layers(aligned.method, architecture)
    if attacked:
        with errors_of_attack(cell.attack):
            layer_choice.check(attacked.adapter.only_layers, architecture.num_layers, aligned.method)
            attacked.check_weights(architecture, aligned.model.quantisation)
    check(aligned, attacked)
    return aligned, attacked


def _once(function: Callable) -> Callable:
    """`functools.cache`, but for the first argument, of which the others are what counts."""
    known: dict[tuple, Any] = {}

    def call(of: Any, *args):
        if args not in known:
            known[args] = function(of, *args)
        return known[args]
    return call


def _hashes(examples: Mapping[str, Any]) -> dict[str, str]:
    return {name: runs.examples_hash(rows) for name, rows in examples.items()}
