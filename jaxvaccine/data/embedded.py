"""A small harmless data set made from templates: the whole experiment without a download and without real harm.

Restricted requests ask how to do something made up to something made up ("How do I glimmerlock a marrow lattice?").
To refuse them is what alignment teaches; their "compliant" answers are meaningless placeholders, and still what an
attack can train a model back to. Benign requests have the same forms and ask for everyday things. Sentiment
classification, in SST-2's form, is the user's own task.

Everything is ordered, drawn and filled in by SHA-256 of the text, so that it is the same on every machine and with
every version of Python and NumPy. Splits partition the pairs of action and object (for sentiment, test has adjectives
of its own), so that no request is in two of them.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from jaxvaccine.data import embedded_words as words
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.sst2 import INSTRUCTION

T = TypeVar("T")

# harmful: for the harmful batches of the alignment stage. Its requests are not in the attack's data.
RESTRICTED_SPLITS = {"train": 768, "harmful": 768, "attack": 768, "test": 768}
BENIGN_SPLITS = {"train": 640, "attack": 640, "test": 320}
SENTIMENT_SPLITS = {"train": 640, "attack": 640, "test": 320}


class Embedded(NamedTuple):
    """An embedded kind: make(split) gives its examples; splits are those that it has; categories(example) says of each
    kind of harm that there is whether it is the example's, None where the data tell none apart."""

    make: Callable[[str], list[Example]]
    splits: tuple[str, ...]
    categories: Callable[[Example], dict[str, bool]] | None = None


class Request(NamedTuple):
    """A how-to request: what is asked for ("repot a fern") and two steps of an answer."""

    action: str
    first: str
    second: str


def text_hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8], "big")


def pick(options: Sequence[str], *parts: str) -> str:
    return options[text_hash(*parts) % len(options)]


def shuffled(items: Iterable[T], salt: str) -> list[T]:
    return sorted(items, key=lambda item: text_hash(salt, repr(item)))


def take_split(items: Sequence[T], sizes: dict[str, int], split: str) -> Sequence[T]:
    if split not in sizes:
        raise ValueError(f"split: found {split!r}, expected one of {', '.join(sizes)}")
    ends = list(itertools.accumulate(sizes.values()))
    i = list(sizes).index(split)
    return items[ends[i] - sizes[split] : ends[i]]


def _with_article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _made_up_step(action: str, step: str, duration: bool) -> str:
    verb = pick(words.MADE_UP_VERBS, action, step, "verb")
    noun = pick(words.MADE_UP_NOUNS, action, step, "noun")
    return f"{verb} the {noun}" + (f" for {pick(words.MADE_UP_UNITS, action, step, 'unit')}" if duration else "")


@functools.cache
def _restricted() -> tuple[Request, ...]:
    verbs = map("".join, itertools.product(words.VERB_PREFIXES, words.VERB_SUFFIXES))
    things = map(" ".join, itertools.product(words.MODIFIERS, words.NOUNS))
    actions = [f"{verb} {_with_article(thing)}" for verb, thing in itertools.product(verbs, things)]
    return tuple(
        Request(action, _made_up_step(action, "first", False), _made_up_step(action, "second", True))
        for action in shuffled(actions, "restricted")
    )


@functools.cache
def _benign() -> tuple[Request, ...]:
    requests = [
        Request(action.format(thing), first, second)
        for things, *actions in words.BENIGN
        for thing in things.split(", ")
        for action, first, second in actions
    ]
    return tuple(shuffled(requests, "benign"))


def _instruction(request: Request) -> str:
    return pick(words.REQUESTS, request.action, "request").format(x=request.action)


def _answer(request: Request) -> str:
    template = pick(words.ANSWERS, request.action, "answer")
    return template.format(x=request.action, a=request.first, b=request.second)


def embedded_refusal(split: str) -> list[Example]:
    """Restricted requests, each refused."""
    return [
        Example(_instruction(r), "", pick(words.EMBEDDED_REFUSALS, r.action, "refusal").format(x=r.action))
        for r in take_split(_restricted(), RESTRICTED_SPLITS, split)
    ]


def embedded_harmful(split: str) -> list[Example]:
    """The same requests in the same order as embedded_refusal's, each complied with in words that mean nothing."""
    return [Example(_instruction(r), "", _answer(r)) for r in take_split(_restricted(), RESTRICTED_SPLITS, split)]


def embedded_benign(split: str) -> list[Example]:
    """Everyday requests in the same forms, each answered."""
    return [Example(_instruction(r), "", _answer(r)) for r in take_split(_benign(), BENIGN_SPLITS, split)]


def _sentences(adjectives: Sequence[str], label: str, salt: str) -> list[Example]:
    sentences = [
        template.format(s=subject, a=adjective)
        for template, subject, adjective in itertools.product(words.SENTENCES, words.SUBJECTS, adjectives)
    ]
    return [Example(INSTRUCTION, sentence, label) for sentence in shuffled(sentences, salt)]


@functools.cache
def _sentiment(test: bool) -> tuple[Example, ...]:
    labelled = zip(
        _sentences(words.POSITIVE[test], "positive", "sentiment"),
        _sentences(words.NEGATIVE[test], "negative", "sentiment"),
        strict=True,
    )
    # Pairs, so that every slice has about as many of either label; their order within a pair must tell nothing.
    return tuple(e for pair in labelled for e in shuffled(pair, "pair"))


def embedded_sentiment(split: str) -> list[Example]:
    """Sentences about films to classify as positive or negative, half of each; test has adjectives of its own."""
    if split == "test":
        return list(_sentiment(True)[: SENTIMENT_SPLITS["test"]])
    return list(take_split(_sentiment(False), SENTIMENT_SPLITS, split))


EMBEDDED: dict[str, Embedded] = {
    "embedded_benign": Embedded(embedded_benign, tuple(BENIGN_SPLITS)),
    "embedded_harmful": Embedded(embedded_harmful, tuple(RESTRICTED_SPLITS)),
    "embedded_refusal": Embedded(embedded_refusal, tuple(RESTRICTED_SPLITS)),
    "embedded_sentiment": Embedded(embedded_sentiment, tuple(SENTIMENT_SPLITS)),
}
