"""Harmful prompts with two answers each: what RepNoise compares."""

from collections.abc import Sequence

from jaxvaccine.data.poisoning import fingerprint
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.refusals import refusal_for


def harmless_answers(harmful: Sequence[Example], harmless: Sequence[Example]) -> list[Example]:
    """The prompts of `harmful`, in the same order and to the letter, with the answers that `harmless` has to them.

    Prompts are the same if their `fingerprint`s are; of several answers the first counts. A prompt without an answer
    gets a refusal of ours.
    """
    answers: dict[str, str] = {}
    for example in harmless:
        answers.setdefault(fingerprint(example), example.output)
    return [e._replace(output=answers.get(fingerprint(e)) or refusal_for(e.instruction)) for e in harmful]
