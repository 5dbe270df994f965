"""How far two judges agree on the answers of evaluations."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from jaxvaccine import data
from jaxvaccine.data.rows import text, where
from jaxvaccine.evaluation.agreement import WORDS, agreement
from jaxvaccine.evaluation.judges import judge_answers
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.config import FieldError, Part, field, flat, require
from jaxvaccine.experiment.judging import JUDGES, JudgePart, judge_record, make_judge
from jaxvaccine.experiment.parts import split_operational
from jaxvaccine.json_files import read_json, write_json

RESULTS = "agreement.json"
DISAGREEMENTS = "disagreements.jsonl"


@dataclasses.dataclass(frozen=True)
class ComparedJudge(JudgePart):
    """Judge."""

    judge: str = field(
        "recorded", "The judge: keyword, world, beaver_dam, chat_api; recorded takes the verdicts in the predictions.")

    @classmethod
    def options(cls):
        return ("recorded", *JUDGES)


@dataclasses.dataclass(frozen=True)
class ComparisonPart(Part):
    """Run."""

    run_dir: str = field("", "Folder for the comparison.")
    predictions: tuple[str, ...] = field((), "Files predictions_harmful_score.jsonl of evaluations.")
    progress: bool = field(True, "Draw progress bars.")
    overwrite: bool = field(False, "Delete an earlier comparison in --run_dir and start again.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        require(bool(self.predictions), "predictions", self.predictions, "at least one file")


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


def compare(config: ComparisonPart, first: ComparedJudge, second: ComparedJudge) -> dict:
    """Carries out the comparison, or reads the results of a finished one: an `Agreement` as JSON values.

    Raises:
      FieldError: both judges are the same.
      FileNotFoundError, ValueError, FileExistsError: as of `read_predictions` and `runs.open_run`.
    """
    predictions = [prediction for path in config.predictions for prediction in read_predictions(path)]
    if first == second:
        raise FieldError("second_judge", f"found {second.judge!r}, expected another than the first, or other settings")
    flags, operational = split_operational(flat(config))
    for name, judge in (("first", first), ("second", second)):
        result, other = split_operational(flat(judge))
        flags |= {f"{name}_{key}": value for key, value in result.items()}
        operational |= {f"{name}_{key}": value for key, value in other.items()}
    made_of = {"hashes": {path: data.file_sha256(path) for path in config.predictions},
               "inputs": {"first": judge_record(first)["inputs"], "second": judge_record(second)["inputs"]}}
    run_dir = runs.open_run(config.run_dir, "compare_judges", flags, made_of, operational, config.overwrite)
    if not (run_dir / RESULTS).exists():
        verdicts = [_verdicts(judge, predictions, config.progress) for judge in (first, second)]
        found = agreement(*verdicts)
        lines = [json.dumps({**{name: row[name] for name in ("prompt", "answer")}, "first": a, "second": b})
                 for row, a, b in zip(predictions, *verdicts, strict=True) if a != b]
        (run_dir / DISAGREEMENTS).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        write_json(run_dir / RESULTS, {**found._asdict(), "rate": found.rate and found.rate._asdict()})
    return read_json(run_dir / RESULTS)


def _verdicts(judge: ComparedJudge, predictions: Sequence[dict[str, str]], progress: bool) -> list[str]:
    if judge.judge == "recorded":
        return [prediction["verdict"] for prediction in predictions]
    # The judge goes with this function: there is not room for two 7B models.
    verdicts = judge_answers(make_judge(judge, progress), [p["prompt"] for p in predictions],
                             [p["answer"] for p in predictions])
    return [verdict.word for verdict in verdicts]


def name_of(judge: ComparedJudge) -> str:
    return f"{judge.judge} ({Path(judge.judge_model).name})" if judge.judge_model else judge.judge
