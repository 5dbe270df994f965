"""How many prompts sets of examples have in common: none where prompts are distinct, and known where rows are taken."""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Any, Literal

from jaxvaccine.data.poisoning import fingerprint, questions
from jaxvaccine.data.prompts import Example, Turn, with_history

# How alike two prompts must be to count as one: to the letter; but for case, white space and Unicode form, the measure
# of leaks; and but for punctuation too.
Likeness = Literal["exact", "normalised", "unpunctuated"]
LIKENESSES: tuple[Likeness, ...] = ("exact", "normalised", "unpunctuated")

Sets = Mapping[str, Collection[str]]


def shared_prompts(sets: Sets, known: Sets = MappingProxyType({})) -> dict[str, dict[str, Any]]:
    """{name: {"prompts": how many it has, "shared": {other: how many of them the other has too}}} of `sets`.

    Others are all of `known` and the sets before it; those with which it shares none are left out. JSON values.

    sets, known: {name: fingerprints of its prompts}, as of `poisoning.fingerprint`.
    """
    found: dict[str, dict[str, Any]] = {}
    others = {name: frozenset(prompts) for name, prompts in known.items()}
    for name, prompts in sets.items():
        own = frozenset(prompts)
        found[name] = {"prompts": len(own), "shared": {
            other: count for other, of in others.items() if (count := len(own & of))}}
        others[name] = own
    return found


def overlaps(sets: Mapping[str, Sequence[Example]]) -> dict[tuple[str, str], dict[Likeness, int]]:
    """{(one set, another): {how alike: how many of the one's different prompts are so alike to one of the other}}.

    Of a conversation every question is one, as where leaks are looked for (`poisoning.questions`)."""
    asked = {name: [one for example in examples for one in questions(example)] for name, examples in sets.items()}
    keys = {name: {likeness: {_key(example, likeness) for example in examples} for likeness in LIKENESSES}
            for name, examples in asked.items()}
    return {(one, other): {likeness: len(keys[one][likeness] & keys[other][likeness]) for likeness in LIKENESSES}
            for one, other in combinations(sets, 2)}


def _key(example: Example, likeness: Likeness) -> object:
    if likeness == "exact":
        return example.instruction, example.input, example.history
    if likeness == "normalised":
        return fingerprint(example)
    turns = [Turn(turn.role, _without_punctuation(turn.text)) for turn in example.history]
    return fingerprint(with_history(Example(*map(_without_punctuation, example[:2])), turns))


def _without_punctuation(text: str) -> str:
    """Punctuation as white space; as it is where nothing else is left."""
    letters = "".join(" " if unicodedata.category(c).startswith("P") else c
                      for c in unicodedata.normalize("NFKC", text))
    return letters if letters.strip() else text
