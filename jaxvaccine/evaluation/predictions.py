"""One prediction: a prompt, what the model answered, and what that counts for."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jaxvaccine.data.prompts import Example, question_text


class Prediction(NamedTuple):
    """One prompt, what the model answered, and what that counts for.

    Attributes:
      prompt: instruction and, on the next line, input, without the template around them; of a conversation all of its
        turns, each behind its speaker's name.
      answer: as of `answers.decode_answer`.
      expected: the example's output; empty where there is no right answer.
      verdict: `Verdict.word`; "correct" or "wrong"; "refused", "answered" or "no answer"; of two answers "win", "loss",
        "tie", "mixed" or "unread".
      reason: why, for a reader.
      counts: whether the score counts it.
      categories: the kinds of harm that the data set finds in the prompt.
      flagged: the kinds of harm that the judge finds in the answer.
      score: the judge's own figure.
      cut: the judge saw the answer's beginning only, or nothing of it.
      phrases: the verdict is one of a judge of phrases.
      verdicts: of a panel, every judge's, by name.
    """

    prompt: str
    answer: str
    expected: str
    verdict: str
    reason: str
    counts: bool
    categories: tuple[str, ...] = ()
    flagged: tuple[str, ...] = ()
    score: float | None = None
    cut: bool = False
    phrases: bool = False
    verdicts: Mapping[str, str] = MappingProxyType({})


def prompt_text(example: Example) -> str:
    question = question_text(example)
    if not example.history:
        return question
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in (*example.history, ("user", question)))


def write_predictions(path: str | os.PathLike, predictions: Sequence[Prediction], *, overwrite: bool = False) -> None:
    """One JSON object per line: prompt, answer, expected, verdict, reason, and what else there is. UTF-8.

    Written whole or not at all.

    Raises:
      FileExistsError: the file exists and overwrite is False.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: found a file of predictions, expected none, or overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, defaults = path.with_name(f".{path.name}.{os.getpid()}.tmp"), Prediction._field_defaults.items()
    try:
        # backslashreplace writes a lone surrogate, which UTF-8 has no bytes for, as JSON's own escape.
        with unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for prediction in predictions:
                # What has a default is left out where it has that value.
                fields = {name: value for name, value in prediction._asdict().items()
                          if name not in ("counts", "phrases") and (name, value) not in defaults}
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
