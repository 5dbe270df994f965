"""How far two judges agree on the answers of evaluations, or a judge with people's labels."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from jaxvaccine import data
from jaxvaccine.data.rows import column, text, where
from jaxvaccine.evaluation.agreement import WORDS, against_labels, agreement
from jaxvaccine.evaluation.judges import HARMFUL, REFUSED, judge_answers
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.config import FieldError, Part, field, flat, require
from jaxvaccine.experiment.given_answers import ANSWER_COLUMNS
from jaxvaccine.experiment.judging import JUDGES, JudgePart, judge_record, make_judge, settings_of
from jaxvaccine.experiment.panel import DISAGREEMENTS
from jaxvaccine.experiment.parts import split_operational
from jaxvaccine.json_files import read_json, write_json

RESULTS = "agreement.json"
RECORDED = "recorded"


@dataclasses.dataclass(frozen=True)
class ComparedJudge(JudgePart):
    """Judge."""

    judge: str = field(
        "recorded", "The judge: keyword, world, beaver_dam, causal, chat_api; recorded takes the verdicts in the "
        "predictions, or the labels.")

    @classmethod
    def options(cls):
        return (RECORDED, *JUDGES)


@dataclasses.dataclass(frozen=True)
class ComparisonPart(Part):
    """Run."""

    run_dir: str = field("", "Folder for the comparison.")
    predictions: tuple[str, ...] = field((), "Files predictions_harmful_score.jsonl of evaluations.")
    labelled: tuple[str, ...] = field(
        (), "Files of answers that people have labelled, in the place of --predictions: prompt, response (or answer) "
        "and is_safe, as BeaverTails has them, or label, harmful or safe. The labels are the first judge.")
    progress: bool = field(True, "Draw progress bars.")
    overwrite: bool = field(False, "Delete an earlier comparison in --run_dir and start again.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        require(bool(self.predictions) != bool(self.labelled), "predictions", self.predictions,
                "at least one file" + (", or --labelled, not both" if self.labelled else ", or --labelled"))


def read_predictions(path: str) -> list[dict[str, str]]:
    """prompt, answer and verdict of every prediction in a file.

    Raises:
      FileNotFoundError, ValueError: as of `data.read_rows`; or a verdict that is not one about harm.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected the predictions of an evaluation")
    found = []
    for i, row in enumerate(data.read_rows(path)):
        prediction = {name: text(row, i, name) for name in ("prompt", "answer", "verdict")}
        if prediction["verdict"] not in WORDS:
            raise ValueError(f"{where(row, i)}: column 'verdict': found {prediction['verdict']!r}, expected one of "
                             f"{', '.join(WORDS)}: the predictions of the harmful score")
        found.append(prediction)
    return found


LABELS = {True: REFUSED, False: HARMFUL, "safe": REFUSED, "harmless": REFUSED, "refused": REFUSED, "harmful": HARMFUL,
          "unsafe": HARMFUL}


def read_labelled(path: str) -> list[dict[str, str]]:
    """prompt, answer and label, as a verdict, of every answer in a file.

    Raises:
      FileNotFoundError, ValueError: as of `data.read_rows`; or a label that is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected answers with labels")
    found = []
    for i, row in enumerate(data.read_rows(path)):
        name = column(row, i, ("is_safe", "label"))
        value = row[name]
        if not isinstance(value, bool if name == "is_safe" else str) or value not in LABELS:
            raise ValueError(f"{where(row, i)}: column {name!r}: found {value!r:.80}, expected "
                             + ("true or false" if name == "is_safe" else "harmful or safe"))
        found.append({"prompt": text(row, i, "prompt"), "answer": text(row, i, *ANSWER_COLUMNS),
                      "verdict": LABELS[value]})
    return found


def compare(config: ComparisonPart, first: ComparedJudge, second: ComparedJudge) -> dict:
    """Carries out the comparison, or reads the results of a finished one: an `Agreement` as JSON values.

    Raises:
      FieldError: both judges are the same.
      FileNotFoundError, ValueError, FileExistsError: as of `read_predictions` and `runs.open_run`.
    """
    predictions = ([row for path in config.labelled for row in read_labelled(path)] if config.labelled else
                   [row for path in config.predictions for row in read_predictions(path)])
    for name, judge in (("first", first), ("second", second)):
        require(len(judge.panel()) == 1, f"{name}_judge", judge.judge, "one judge, not a panel")
    require(not config.labelled or first.judge == RECORDED, "first_judge", first.judge,
            "none beside --labelled, whose labels are the first")
    if first == second:
        raise FieldError("second_judge", f"found {second.judge!r}, expected another than the first, or other settings")
    flags, operational = split_operational(flat(config))
    for name, judge in (("first", first), ("second", second)):
        result, other = settings_of(judge), split_operational(flat(judge))[1]
        flags |= {f"{name}_{key}": value for key, value in result.items()}
        operational |= {f"{name}_{key}": value for key, value in other.items()}
    made_of = {"hashes": {path: data.file_sha256(path) for path in (*config.predictions, *config.labelled)},
               "inputs": {"first": judge_record(first)["inputs"], "second": judge_record(second)["inputs"]}}
    run_dir = runs.open_run(config.run_dir, "compare_judges", flags, made_of, operational, config.overwrite)
    if not (run_dir / RESULTS).exists():
        verdicts = [_verdicts(judge, predictions, config.progress) for judge in (first, second)]
        found = agreement(*verdicts)
        lines = [json.dumps({**{name: row[name] for name in ("prompt", "answer")}, "first": a, "second": b})
                 for row, a, b in zip(predictions, *verdicts, strict=True) if a != b]
        (run_dir / DISAGREEMENTS).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        beside = {}
        if config.labelled:
            against = against_labels(*verdicts)
            beside["against"] = {**against._asdict(), "found": against.found._asdict(),
                                 "spared": against.spared._asdict()}
        write_json(run_dir / RESULTS, {**found._asdict(), "rate": found.rate and found.rate._asdict(), **beside})
    return read_json(run_dir / RESULTS)


def _verdicts(judge: ComparedJudge, predictions: Sequence[dict[str, str]], progress: bool) -> list[str]:
    if judge.judge == RECORDED:
        return [prediction["verdict"] for prediction in predictions]
    # The judge goes with this function: there is not room for two 7B models.
    verdicts = judge_answers(make_judge(judge, progress), [p["prompt"] for p in predictions],
                             [p["answer"] for p in predictions])
    return [verdict.word for verdict in verdicts]


def name_of(judge: ComparedJudge) -> str:
    return f"{judge.judge} ({Path(judge.judge_model).name})" if judge.judge_model else judge.judge
