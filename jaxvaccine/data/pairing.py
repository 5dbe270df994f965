"""Harmful prompts with two answers each: what RepNoise compares."""

from collections.abc import Sequence

from jaxvaccine.data.accounts import Account, Located, locate
from jaxvaccine.data.poisoning import fingerprint, same_prompt
from jaxvaccine.data.prompts import Example, with_history
from jaxvaccine.data.refusals import refusal_for
from jaxvaccine.data.texts import is_blank

OURS = "refusals of ours"  # in the place of a source


def harmless_answers(harmful: Sequence[Example], harmless: Sequence[Example]) -> list[Example]:
    """The prompts of `harmful`, in the same order and to the letter, with the answers that `harmless` has to them.

    Prompts are the same if their `fingerprint`s are; of several answers the first counts, one to the very same prompt
    before others. A prompt without an answer gets a refusal of ours. The examples have the places of their answers.
    """
    answers: dict[object, Example] = {}
    for example in harmless:
        if not is_blank(example.output):
            for key in (same_prompt(example), fingerprint(example)):
                answers.setdefault(key, example)
    found = [answers.get(same_prompt(e)) or answers.get(fingerprint(e)) for e in harmful]
    ours = Account(OURS, found.count(None), examples=found.count(None))
    return [locate(e._replace(output=refusal_for(e.instruction)), f"{OURS}, row {i} (from 0)", Example._fields, ours)
            if answer is None else _to_the_letter(e, answer)
            for i, (e, answer) in enumerate(zip(harmful, found, strict=True))]


def _to_the_letter(example: Example, answer: Example) -> Example:
    """The example's prompt with another's answer, at the other's place."""
    found = with_history(Example(example.instruction, example.input, answer.output), example.history)
    return answer.like(found) if isinstance(answer, Located) else found
