"""Answers that end in a number: GSM8K."""

import re
from collections.abc import Sequence

from jaxvaccine.data.gsm8k import ANSWER_PROMPT, MARKER
from jaxvaccine.data.prompts import Example
from jaxvaccine.evaluation.answers import EMPTY_ANSWER, is_empty
from jaxvaccine.evaluation.predictions import Prediction, prompt_text
from jaxvaccine.evaluation.quantities import Number, find_numbers, find_values, written

_MARKER = re.compile(f"{re.escape(MARKER)}|{re.escape(ANSWER_PROMPT.strip())}", re.IGNORECASE)


def find_answer(text: str) -> Number | None:
    """The number that a solution gives as its answer: the first behind "####" or "The final answer is:", else the last.

    As the papers' programs have it (gsm8k/pred_eval.py of Booster and T-Vaccine), where the marker is the second of
    these, except that they take "1,2,3" for 123, "16-3" for 16 and -3, and what is written in other ways than with
    digits, commas and a point for the pieces of it. None if there is no number, or one in its place that is not read.
    """
    parts = _MARKER.split(text, maxsplit=2)
    marked = find_values(parts[1], marked=True) if len(parts) > 1 else []
    return marked[0] if marked else next(reversed(find_values(text)), None)


def is_single(text: str) -> bool:
    """Whether a right answer is one number: there is one, and behind a marker no other one."""
    parts = _MARKER.split(text, maxsplit=2)
    marked = find_values(parts[1], marked=True) if len(parts) > 1 else []
    return find_answer(text) is not None and all(value == marked[0] for value in marked)


def mentions_answer(answer: str, expected: str) -> bool:
    """The lenient rule: the right number is anywhere among the answer's, which some are by chance: an upper bound."""
    right = find_answer(expected)
    return right in find_numbers(answer) or find_answer(answer) == right


def score_gsm8k(examples: Sequence[Example], answers: Sequence[str]) -> list[Prediction]:
    """Counts the answers whose number is the one of the example's output. `expected` is that number."""
    predictions = []
    for example, answer in zip(examples, answers, strict=True):
        expected, found = find_answer(example.output), find_answer(answer)
        correct = found == expected
        no_number = EMPTY_ANSWER if is_empty(answer) else "no number"
        reason = no_number if found is None else f"answers {written(found)}"
        predictions.append(Prediction(prompt_text(example), answer, written(expected),
                                      "correct" if correct else "wrong", reason, correct))
    return predictions
