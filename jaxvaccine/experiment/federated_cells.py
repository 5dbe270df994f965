"""The cells of a federated study: models are aligned as those of a plan with lanes, then fine-tuned by clients.

The folder is a plan's, with the text of a `Setting` in the place of an attack's and rounds in the place of its steps.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvaccine import data
from jaxvaccine.experiment import carry_out as engine
from jaxvaccine.experiment import federated, lane_attacks, lane_cells, lanes, results, runs, stage
from jaxvaccine.experiment.align import AlignConfig, load_data
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.attack_rows import take
from jaxvaccine.experiment.attack_scores import as_attacked
from jaxvaccine.experiment.checks import MadeOf, check_plan
from jaxvaccine.experiment.config import flat
from jaxvaccine.experiment.federated import FederationPart, Setting
from jaxvaccine.experiment.judging import probe
from jaxvaccine.experiment.lane_scores import Scorer
from jaxvaccine.experiment.plan_folder import Context, Probes, check_same, collect, finish, result_path, say_scores
from jaxvaccine.experiment.plans import Plan, Settings, cell_configs
from jaxvaccine.experiment.results import Cell, Row
from jaxvaccine.json_files import write_json

# Of a task with more answers, those whose counts are kept.
MOST_LABELS = 20


class Federated(NamedTuple):
    """A study: what it goes through.

    Attributes:
      plan: backbones × (method, text of a setting) × seeds; its score_steps are rounds.
      of: {text: setting}.
      settings: what alignments and clients start from.
      part: of the federation, the same in all cells.
      root: the folder.
    """

    plan: Plan
    of: Mapping[str, Setting]
    settings: Settings
    part: FederationPart
    root: Path

    @property
    def cells(self) -> list[Cell]:
        return [Cell(backbone, method, text, seed) for backbone in self.plan.backbones
                for method, text in self.plan.pairs for seed in self.plan.seeds]


def carry_out(study: Federated, overwrite: bool = False, say: Callable[[str], None] = print) -> None:
    """Carries out the cells that are not there yet; the table of results grows with every setting.

    Raises:
      FieldError, ValueError, FileNotFoundError: a setting, file or row that is not valid, before anything is trained.
      FileExistsError: the folder holds a study with other settings.
    """
    made_of = check(study)
    if not overwrite:
        for cell, inputs_now in made_of.items():
            check_same(study.root, cell, inputs_now)
    if any(overwrite or not result_path(study.root, cell).exists() for cell in made_of):
        probe(study.settings.scores.judge, bool(study.settings.scores.tests.harmful_test))
    aligned = Plan.product(study.plan.backbones, study.plan.methods, ("",), study.plan.seeds)
    engine.carry_out(aligned, study.settings, study.root, as_lanes=True, overwrite=overwrite, say=say)
    # Reports go by the whole plan, of which that was a part.
    config = runs.read_config(study.root)
    config["operational"]["plan"]["pairs"] = [list(pair) for pair in study.plan.pairs]
    write_json(study.root / runs.CONFIG, config)
    context = Context(study.plan, study.settings, study.root, made_of, Probes(), lambda folder: None, say)
    collect(study.root, study.plan)
    for backbone in study.plan.backbones:
        _carry_out_backbone(study, context, backbone)


def check(study: Federated) -> dict[Cell, MadeOf]:
    """{cell: what it is made of}. Raises as `carry_out`, but for the folder."""
    part, settings = study.part, study.settings
    for setting in study.of.values():
        federated.parse_rule(setting.rule, part.participants)
        federated.check_split(setting.split)
    reads: dict[Cell, Cell] = {}
    ns: dict[Cell, int] = {}
    for cell in study.cells:
        _, config = _configs(study, cell)
        n = ns[cell] = config.data.n
        counts = federated.harmful_counts(part, n, float(study.of[cell.attack].harmful_clients), cell.seed)
        reads[cell] = cell._replace(attack=federated.attack_text(int(counts.sum()), n))
    pairs = dict.fromkeys((cell.method, cell.attack) for cell in reads.values())
    found = check_plan(Plan(study.plan.backbones, tuple(pairs), study.plan.seeds), settings, study.root, True,
                       lambda aligned, attacked: None)
    # Of every split once: which rows there are to split does not depend on the method.
    for cell in {(c.backbone, c.seed, study.of[c.attack].split): c for c in study.cells}.values():
        federated.client_rows(settings, cell, study.of[cell.attack]._replace(harmful_clients="0"), part, {},
                              _tokenizer(cell.backbone, settings.scores.model.revision))
    return {cell: {**found[of], "federation": {**flat(part), **study.of[cell.attack]._asdict(), "n": ns[cell]}}
            for cell, of in reads.items()}


def _configs(study: Federated, cell: Cell) -> tuple[AlignConfig, AttackConfig]:
    """Of a cell's alignment, and of what its clients train with."""
    return cell_configs(study.settings, study.root, cell._replace(attack=federated.attack_text(0, 1)))


_tokenizer = functools.lru_cache(maxsize=4)(stage.load_tokenizer)


def _carry_out_backbone(study: Federated, context: Context, backbone: str) -> None:
    missing = [cell for cell in study.cells
               if cell.backbone == backbone and not result_path(study.root, cell).exists()]
    if not missing:
        return
    tokenizer = _tokenizer(backbone, study.settings.scores.model.revision)
    scorer = Scorer(study.settings.scores, tokenizer)
    for method, text in dict.fromkeys((cell.method, cell.attack) for cell in missing):
        cells = [cell for cell in missing if (cell.method, cell.attack) == (method, text)]
        _carry_out_setting(study, context, cells, tokenizer, scorer)
        say_scores(context, cells)


def _carry_out_setting(study: Federated, context: Context, cells: Sequence[Cell], tokenizer: Any, scorer: Scorer
                       ) -> None:
    """All seeds of a method and a setting."""
    settings, part, setting = study.settings, study.part, study.of[cells[0].attack]
    aligned, config = _configs(study, cells[0])
    scorer = scorer.of(as_attacked(scorer.config, config))
    prompts = {name: stage.prompts_of(rows) for name, rows in load_data(aligned.data, aligned.method).items()}
    found_runs, records = [], []
    for cell in cells:
        rows = federated.client_rows(settings, cell, setting, part, prompts, tokenizer)
        everything = [e for of in rows for e in of]
        tokenized = data.tokenize_examples(tokenizer, everything, config.data.max_length, config.data.form)
        ends = np.cumsum([0, *map(len, rows)])
        counts = federated.harmful_counts(part, config.data.n, float(setting.harmful_clients), cell.seed)
        found_runs.append(federated.Run([take(tokenized, np.arange(*piece)) for piece in itertools.pairwise(ends)],
                                        counts > 0, cell.seed))
        record = stage.training_record({"user": everything}, {"user": tokenized})
        records.append({**scorer.beside(record, prompts), "clients": {
            "rows": np.diff(ends).tolist(), "harmful": counts.tolist(), "labels": _labels(rows)}})
    found: list[list[Row]] = [[] for _ in cells]
    answers: dict[str, Any] = {}

    def observe(number: int, of: lanes.Lanes, measured: dict[str, np.ndarray]) -> None:
        if number != part.rounds and number not in study.plan.score_steps:
            return
        scores, answers[str(number)] = scorer(of, [cell.seed for cell in cells])
        for i, cell in enumerate(cells):
            found[i].extend(results.score_rows(cell, "attack", number, scores[i], settings.by_category))
            known = {name: values[i] for name, values in measured.items() if not np.isnan(values[i])}
            found[i].extend(results.measured_rows(cell, "attack", number, known))

    federated.train(_start(study, cells), found_runs, setting.rule, part, config.training, config.data.bucket, observe,
                    settings.scores.run.progress, f"{cells[0].method} {setting.text}")
    for i, cell in enumerate(cells):
        finish(context, cell, found[i], answers if i == 0 else None, **records[i])


def _labels(rows: Sequence[Sequence[data.Example]]) -> list[dict[str, int]]:
    """How often a client has each answer, of those that several rows have: how far the split is from iid."""
    counts = [Counter(e.output for e in of) for of in rows]
    common = [text for text, count in sum(counts, Counter()).items() if count > 1][:MOST_LABELS]
    return [{text: of[text] for text in common if of[text]} for of in counts]


def _start(study: Federated, cells: Sequence[Cell]) -> lanes.Lanes:
    """The aligned models of these cells, with the adapters that clients train."""
    seeds = [cell.seed for cell in cells]
    aligned, config = _configs(study, cells[0])
    base = stage.load_base(cells[0].backbone, aligned.model.dtype, revision=aligned.model.revision,
                           quantisation=aligned.model.quantisation)
    of = lane_cells.with_aligned(lane_cells.new_lanes(aligned, base, seeds), study.root, cells)
    adapter = config.adapter.resolve(flat(aligned), config.method, config.ablation)
    return lane_attacks.begin(of, adapter, config.ablation, None, seeds)
