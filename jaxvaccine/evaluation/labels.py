"""Answers that are one of a few labels: SST-2 and AG News, by the rules of both papers and by a lenient one of ours."""

import re
from collections.abc import Callable, Mapping, Sequence

from jaxvaccine.data import agnews
from jaxvaccine.data.prompts import Example
from jaxvaccine.evaluation.judges import EMPTY_ANSWER, is_empty
from jaxvaccine.evaluation.predictions import Prediction, prompt_text

# Each label, and other words that name it.
SST2_LABELS: Mapping[str, tuple[str, ...]] = {"negative": (), "positive": ()}
AGNEWS_WORDS = {"Sports": ("sport",), "Sci/Tech": ("sci", "tech", "scitech", "science", "technology")}
AGNEWS_LABELS: Mapping[str, tuple[str, ...]] = {label: AGNEWS_WORDS.get(label, ()) for label in agnews.LABELS}
# Booster's agnews/pred_eval.py takes "sci" for "Sci/Tech".
_SHORT = {"sci/tech": "sci"}


def is_label(answer: str, label: str) -> bool:
    """Booster's rule, the strict one: the answer, stripped and without regard to case, is the label and nothing else.

    As its program scores SST-2 and AG News (sst2/pred_eval.py and agnews/pred_eval.py: equal to "positive" or
    "Positive" after strip; "Sci/Tech" or "sci"); a full stop makes it wrong. `mentions_only` is the lenient rule.
    """
    answer, label = answer.strip().casefold(), label.casefold()
    return answer == label or answer == _SHORT.get(label)


def contains_label(answer: str, label: str) -> bool:
    """T-Vaccine's rule (its sst2/pred_eval.py and ag_news/pred_eval.py): the label occurs in the answer, as a part of a
    word too, with all letters small or the first one large; for "Sci/Tech" that or "sci".

    Blind to other labels beside it, and to "not": whoever answers with all labels is right.
    """
    return any(text in answer for text in (label.capitalize() if label.islower() else label,
                                           _SHORT.get(label.casefold(), label.casefold())))


LABEL_RULES: Mapping[str, Callable[[str, str], bool]] = {"equals": is_label, "contains": contains_label}


def mentions_only(answer: str, label: str, labels: Sequence[str] | Mapping[str, Sequence[str]]) -> bool:
    """The lenient rule: of all labels exactly the right one occurs in the answer as a word. Blind to "not".

    Args:
      answer: the model's.
      label: the right one.
      labels: all of them; a mapping adds words that stand for a label.
    """
    words = set(re.findall(r"\w+", answer.casefold()))
    others = labels if isinstance(labels, Mapping) else dict.fromkeys(labels, ())
    return {other for other, more in others.items() if words & {other.casefold(), *more}} == {label}


def find_label(example: Example, labels: Sequence[str] | Mapping[str, Sequence[str]]) -> str | None:
    """The label that is the example's output, without regard to case and surrounding space."""
    output = example.output.strip().casefold()
    return next((label for label in labels if label.casefold() == output), None)


def score_labels(examples: Sequence[Example], answers: Sequence[str], labels: Mapping[str, Sequence[str]],
                 rule: str = "equals") -> list[Prediction]:
    """Counts the answers that are the example's label by a rule, a key of LABEL_RULES."""
    predictions = []
    for example, answer in zip(examples, answers, strict=True):
        label = find_label(example, labels)
        correct = LABEL_RULES[rule](answer, label)
        if correct:
            reason = f"{rule} the label"
        elif is_empty(answer):
            reason = EMPTY_ANSWER
        elif mentions_only(answer, label, labels):
            reason = "contains the label, but is not equal to it" if rule == "equals" else "the label in other letters"
        else:
            reason = "not the label"
        verdict = "correct" if correct else "wrong"
        predictions.append(Prediction(prompt_text(example), answer, label, verdict, reason, correct))
    return predictions
