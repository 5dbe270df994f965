"""Answers that are there already, judged: those of an earlier evaluation, or of another program."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxvaccine import data
from jaxvaccine.data.rows import text, where
from jaxvaccine.evaluation import write_predictions
from jaxvaccine.evaluation.tasks import HARMFUL_SCORE
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.answer_log import read_answers
from jaxvaccine.experiment.config import FieldError, names
from jaxvaccine.experiment.judged import RESULTS, give_way
from jaxvaccine.experiment.judging import JudgePart, check_prompts, judge_record, probe
from jaxvaccine.experiment.panel import judge_harm
from jaxvaccine.experiment.parts import RunPart, split_operational
from jaxvaccine.experiment.summary import summary
from jaxvaccine.json_files import read_json, write_json

ANSWER_COLUMNS = ("answer", "response")  # ours, BeaverTails'
PREDICTIONS, ANSWERS = f"predictions_{HARMFUL_SCORE}.jsonl", f"answers_{HARMFUL_SCORE}.jsonl"


class Given(NamedTuple):
    """Prompts and their answers.

    Attributes:
      examples: the prompts, without outputs.
      answers: as many.
      categories: the kinds of harm by the prompt's fingerprint.
      made_of: hashes of the rows, and of the evaluation that they are from.
    """

    examples: list[data.Example]
    answers: list[str]
    categories: dict[str, tuple[str, ...]]
    made_of: dict[str, Any]


def read_given(source: str) -> Given:
    """The answers to harmful prompts in the folder of an evaluation, or in a file with the columns prompt, answer (or
    response) and perhaps category: a name, several, or BeaverTails' {name: true or false}.

    Raises:
      FileNotFoundError: there is neither.
      FieldError: the folder is no evaluation's that judged harm, or its predictions are not of its answers any more.
      ValueError: as of `data.read_rows`; or a row without prompt or answer.
    """
    path, made_of = Path(source), {}
    if path.is_dir():
        config = runs.read_config(path)
        if config.get("script") != "evaluate" or not (path / PREDICTIONS).is_file():
            raise FieldError("answers", f"found {source!r}, without {PREDICTIONS}, expected the folder of an "
                                        "evaluation that judged harmful answers; one whose judge failed goes on by "
                                        "its own command, with another --judge")
        kept = {name: value for name, value in config["flags"].items() if name not in names(JudgePart)}
        made_of["evaluation"] = _hash({"flags": kept, "data": config.get("data")})
        rows, answered = data.read_rows(path / PREDICTIONS), read_answers(path / ANSWERS)
        if answered and [answered[i] for i in sorted(answered)] != [row.get("answer") for row in rows]:
            raise FieldError("answers", f"found {source!r}, whose {PREDICTIONS} is not of the answers in {ANSWERS}; "
                                        "re-run its command with --overwrite")
    elif path.is_file():
        rows = data.read_rows(source)
    else:
        raise FileNotFoundError(f"{source}: found no such file or folder, expected answers to judge")
    examples, answers, categories = [], [], {}
    for i, row in enumerate(rows):
        example = data.Example(text(row, i, "prompt"), "", "")
        examples.append(example)
        answers.append(text(row, i, *ANSWER_COLUMNS))
        if not example.instruction.strip():
            raise ValueError(f"{where(row, i)}: column 'prompt': found an empty prompt, expected a text")
        if found := _categories(row, i):
            known = categories.get(data.fingerprint(example), ())
            categories[data.fingerprint(example)] = tuple(sorted({*known, *found}))
    if not rows:
        raise ValueError(f"{source}: found no answers, expected at least one")
    listed = [[example.instruction, answer] for example, answer in zip(examples, answers, strict=True)]
    return Given(examples, answers, categories, {**made_of, "rows": _hash([listed, categories])})


def _categories(row: Mapping[str, Any], i: int) -> tuple[str, ...]:
    value = row.get("category", row.get("categories"))
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping) and all(isinstance(v, bool) for v in value.values()):
        return tuple(name for name, holds in value.items() if holds)
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ValueError(f"{where(row, i)}: column 'category': found {value!r:.80}, expected a name, a list of names, or "
                     "{name: true or false}")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def judge_given(source: str, judge: JudgePart, run: RunPart, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Judges the answers of `read_given`, or reads the results of such an evaluation that has finished.

    flags: all flat settings of the evaluation, which its folder records.

    Returns, raises: as of `evaluate`.
    """
    given = read_given(source)
    own, path = Path(run.run_dir).resolve(), Path(source).resolve()
    if own in (path, *path.parents):
        raise FieldError("run_dir", f"found {run.run_dir!r}, which holds the answers of {source!r}, expected a folder "
                                    "of its own: --overwrite would delete them")
    check_prompts(judge, given.examples)
    judged_by = judge_record(judge)
    settled, operational = split_operational(flags)
    run_dir = runs.open_run(run.run_dir, "evaluate", settled, {"hashes": {}, "inputs": {"answers": given.made_of}},
                            operational, run.overwrite, names(JudgePart) | {"eval_batch_size"})
    give_way(run_dir, judged_by)
    if (run_dir / RESULTS).exists():
        return read_json(run_dir / RESULTS)
    if len(judge.panel()) > 1:  # another judge may take hours before an endpoint is asked
        probe(judge)
    judged = judge_harm(judge, given.examples, given.answers, given.categories, run.progress)
    write_predictions(run_dir / PREDICTIONS, judged.first.predictions, overwrite=True)
    judged.write(run_dir)
    results = {judged.first.name: summary(judged.first)}
    write_json(run_dir / RESULTS, results)
    return results
