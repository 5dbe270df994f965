"""How far two judges agree on the answers of evaluations: Cohen's kappa, the table of verdicts, every disagreement.

  python -m experiments.compare_judges --run_dir=runs/judges --second_judge=beaver_dam \\
      --predictions=runs/booster-p0.1-scores/predictions_harmful_score.jsonl

The first judge is the one whose verdicts the predictions hold, unless --first_judge names another.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from absl import app

from experiments import common, config_flags, reports
from experiments.config_flags import flag
from experiments.judging import JudgeConfig, make_judge
from jaxvaccine import data, runs
from jaxvaccine.data.rows import text, where
from jaxvaccine.evaluation.agreement import WORDS, Agreement, agreement

RESULTS = "agreement.json"
DISAGREEMENTS = "disagreements.jsonl"


@dataclasses.dataclass(frozen=True)
class ComparedConfig(JudgeConfig):
    """Flags of one of the two judges."""

    judge: Literal["recorded", "keyword", "beaver_dam", "chat_api"] = flag(
        "recorded", "The judge; recorded takes the verdicts that are in the predictions.")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Flags of compare_judges.py beside those of the judges (with the prefixes first_ and second_)."""

    run_dir: str = flag("", "Folder for the comparison.")
    predictions: tuple[str, ...] = flag((), "Files predictions_harmful_score.jsonl of evaluations.")
    progress: bool = flag(True, "Draw progress bars.")
    overwrite: bool = flag(False, "Delete an earlier comparison in --run_dir and start again.")

    def __post_init__(self):
        common.require(self, "run_dir", bool(self.run_dir), "a folder")
        common.require(self, "predictions", bool(self.predictions), "at least one file")


def read_predictions(path: str) -> list[dict[str, str]]:
    """prompt, answer and verdict of every prediction in a file.

    Raises:
      FileNotFoundError, ValueError: as of `data.read_rows`; or a verdict that is not one about safety.
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


def compare(config: CompareConfig, first: ComparedConfig, second: ComparedConfig) -> str:
    """Carries out the comparison and writes it; returns the report."""
    predictions = [prediction for path in config.predictions for prediction in read_predictions(path)]
    if first == second:
        raise ValueError(f"--second_judge: found {second.judge!r}, expected another than the first, or other flags")
    flags, operational = common.result_flags(config)
    for name, judge in (("first", first), ("second", second)):
        result, other = common.result_flags(judge)
        flags |= {f"{name}_{key}": value for key, value in result.items()}
        operational |= {f"{name}_{key}": value for key, value in other.items()}
    hashes = {path: data.file_sha256(path) for path in config.predictions}
    run_dir = runs.open_run(config.run_dir, "compare_judges", flags, {"hashes": hashes}, operational, config.overwrite)
    if not (run_dir / RESULTS).exists():
        verdicts = [_verdicts(judge, predictions) for judge in (first, second)]
        found = agreement(*verdicts)
        lines = [json.dumps({**{name: row[name] for name in ("prompt", "answer")}, "first": a, "second": b})
                 for row, a, b in zip(predictions, *verdicts, strict=True) if a != b]
        (run_dir / DISAGREEMENTS).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        (run_dir / reports.REPORT).write_text(_report(found, _name(first), _name(second)), encoding="utf-8")
        runs.write_json(run_dir / RESULTS, {**found._asdict(), "rate": found.rate._asdict()})
    return (run_dir / reports.REPORT).read_text(encoding="utf-8")


def _verdicts(config: ComparedConfig, predictions: Sequence[dict[str, str]]) -> list[str]:
    if config.judge == "recorded":
        return [prediction["verdict"] for prediction in predictions]
    # The judge goes with this function: there is not room for two 7B models.
    verdicts = make_judge(config)([p["prompt"] for p in predictions], [p["answer"] for p in predictions])
    return [verdict.word for verdict in verdicts]


def _name(config: ComparedConfig) -> str:
    return f"{config.judge} ({Path(config.judge_model).name})" if config.judge_model else config.judge


def _report(found: Agreement, first: str, second: str) -> str:
    kappa = "is not defined: each judge says the same of every answer"
    if found.kappa is not None:
        low, high = found.kappa_interval
        kappa = f"{found.kappa:.3f} ({low:.3f} to {high:.3f}, bootstrap over answers)"
    low, high = found.rate.interval
    rows = [[f"{first}: {name}", *map(str, counts)] for name, counts in zip(WORDS, found.table, strict=True)]
    return "\n".join([
        f"# {first} and {second} on {sum(map(sum, found.table))} answers\n",
        reports.table(["", *(f"{second}: {name}" for name in WORDS)], rows),
        f"Of {found.rate.n} answers that both could judge they agree on {found.rate.score:.1f}% ({low:.1f} to "
        f"{high:.1f}). Cohen's kappa {kappa}. Intervals are 95%. Where they differ: {DISAGREEMENTS}.\n"])


def main(argv: list[str]) -> None:
    with common.readable_errors("compare_judges", argv):
        config = config_flags.read(CompareConfig)
        judges = [config_flags.read(ComparedConfig, prefix, progress=config.progress)
                  for prefix in ("first_", "second_")]
        print(compare(config, *judges))


if __name__ == "__main__":
    config_flags.define(CompareConfig)
    for _prefix in ("first_", "second_"):
        config_flags.define(ComparedConfig, _prefix, without=("progress",))
    app.run(main)
