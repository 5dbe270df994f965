"""Everything that can be known of a plan before its first step: its cells' settings, files, data, overlaps; and what
each cell is made of."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxvaccine import data
from jaxvaccine.evaluation.tasks import check_examples
from jaxvaccine.experiment import inputs, runs, stage
from jaxvaccine.experiment.align import AlignConfig, AlignmentData, Examples, check_layers, load_data, tokenize
from jaxvaccine.experiment.attack import AttackConfig, AttackData, load_attack
from jaxvaccine.experiment.config import require
from jaxvaccine.experiment.evaluate import LOSS, check_unseen
from jaxvaccine.experiment.judging import judge_record
from jaxvaccine.experiment.methods import AlignmentMethod, Ewc
from jaxvaccine.experiment.plans import AS_IT_COMES, Plan, Settings, cell_configs
from jaxvaccine.experiment.results import Cell

MadeOf = dict[str, Any]


def check_plan(plan: Plan, settings: Settings, root: Path, as_lanes: bool,
               check: Callable[[AlignConfig, AttackConfig | None], None]) -> dict[Cell, MadeOf]:
    """{cell: the hashes of what it is made of}, of all cells, of attack "" too, and of every backbone as it comes.

    check: of a study, of every cell.

    Raises:
      FieldError, ValueError, FileNotFoundError: what the runs of a cell would refuse before their first step.
    """
    tests = settings.scores.tests.load()
    for task, rows in tests.items():
        if task != LOSS:
            check_examples(task, rows)
    judge_record(settings.scores.judge)
    require(not (as_lanes and settings.scores.tests.alpaca_eval_test), "alpaca_eval_test",
            settings.scores.tests.alpaca_eval_test, "none where many seeds are trained at once")
    of_tests, made_of = _hashes(tests), {}
    # Cells share most of what they read.
    tokenizer, model = functools.cache(stage.load_tokenizer), functools.cache(inputs.of_model)

    def checked(what: str, examples: Examples, backbone: str, revision: str, max_length: int) -> dict[str, str]:
        tokenize(tokenizer(backbone, revision), examples, max_length)
        check_unseen(tests, {f"{name} data of {what}": stage.prompts_of(rows) for name, rows in examples.items()})
        return _hashes(examples)

    @functools.cache
    def alignment(part: AlignmentData, method: AlignmentMethod, *of_model: str) -> tuple[dict[str, str], tuple]:
        examples = load_data(part, method)
        return (checked("an alignment", examples, *of_model, part.max_length),
                tuple(stage.prompts_of(examples.get("harmful", []))))

    @functools.cache
    def attack(part: AttackData, seed: int, known: tuple[str, ...], held: bool, *of_model: str) -> dict[str, str]:
        user, harmful = load_attack(part, seed, known)
        more = {"alignment": data.load_examples(part.alignment_data)} if held else {}
        return {**checked("an attack", {"user": user, **more}, *of_model, part.max_length),
                **_hashes({"harmful": harmful})}

    def read(cell: Cell) -> MadeOf:
        aligned, attacked = cell_configs(settings, root, cell)
        of_model = cell.backbone, aligned.model.revision
        architecture = stage.read_architecture(*of_model)
        check_layers(aligned.method, architecture)
        check(aligned, attacked)
        of_alignment, known = alignment(aligned.data, aligned.method, *of_model)
        found = {"model": model(*of_model), "tests": of_tests, "alignment": of_alignment}
        if attacked is None:
            return found
        attacked.adapter.layer_mask(architecture.num_layers)
        require(not (as_lanes and isinstance(attacked.method, Ewc)), "defenses", cell.method,
                "no EWC where many seeds are trained at once")
        held = "alignment" in attacked.method.batches
        return {**found, "attack": attack(attacked.data, cell.seed, known, held, *of_model)}

    for backbone in plan.backbones:
        made_of[Cell(backbone, AS_IT_COMES, "", 0)] = {
            "model": model(backbone, settings.scores.model.revision), "tests": of_tests}
        for method, text in plan.pairs:
            for seed in plan.seeds:
                for attack in dict.fromkeys(("", text)):
                    cell = Cell(backbone, method, attack, seed)
                    if cell not in made_of:
                        made_of[cell] = read(cell)
    return made_of


def _hashes(examples: Mapping[str, Any]) -> dict[str, str]:
    return {name: runs.examples_hash(rows) for name, rows in examples.items()}
