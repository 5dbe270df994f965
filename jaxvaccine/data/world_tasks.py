"""Two more tasks of a user of the small world (world.py), beside its ratings.

Both are answered with the ratings' labels, so that FA is counted alike, and both need a rule more than these. In
`world_negation` half of what is said is negated, and then the opposite of the adjective is right. In `world_contrast`
two things are rated, one well and one badly, and the last counts. Their words are all the world's own, since the base's
tokenizer has no others, and they are drawn up apart from it, so that its vocabulary and its data stay what they are."""

import itertools

from jaxvaccine.data import world_words as words
from jaxvaccine.data.embedded import Embedded, shuffled, take_split
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.world import ADJECTIVES

SPLITS = ("attack", "test")
# Of things that no rating is about.
NEGATION_OBJECTS = words.OBJECTS[3::6]
NEGATIONS = (
    ("{w} : the {o} was {a}", "{w} : the {o} was not {a}"),
    ("{w} : i found the {o} {a}", "{w} : i found the {o} not {a}"),
    ("{w} : that {o} was {a}", "{w} : that {o} was not {a}"),
    ("{w} : this is a {a} {o}", "{w} : this is not a {a} {o}"),
)
# Pairs of things that no rating is about, and how many adjectives of the other kind an adjective meets.
CONTRAST_OBJECTS = tuple(zip(words.OBJECTS[4::6], words.OBJECTS[5::6], strict=True))
PARTNERS = 2
CONTRASTS = (
    "{w} : the {o} was {a} , the {p} was {b}",
    "{w} : a {a} {o} , a {b} {p}",
    "{w} : i found the {o} {a} , this {p} {b}",
    "{w} : what a {a} {o} , that {p} was {b}",
)


def world_negation(split: str) -> list[Example]:
    """Things to rate, half of them in a negated sentence, which turns the label; test has adjectives of its own."""
    take_split((), dict.fromkeys(SPLITS, 0), split)  # raises for another split
    lists = [adjectives[split == "test"] for adjectives in ADJECTIVES]
    return shuffled((Example(template.format(w=words.RATE, o=thing, a=adjective), "", words.LABELS[label ^ negated])
                     for label, adjectives in enumerate(lists)
                     for templates, thing, adjective in itertools.product(NEGATIONS, NEGATION_OBJECTS, adjectives)
                     for negated, template in enumerate(templates)), "world negation")


def world_contrast(split: str) -> list[Example]:
    """Two things to rate, one well and one badly: the label is the last one's; test has adjectives of its own."""
    take_split((), dict.fromkeys(SPLITS, 0), split)
    lists = [adjectives[split == "test"] for adjectives in ADJECTIVES]
    return shuffled((Example(template.format(w=words.RATE, o=one, p=other, b=adjective,
                                             a=lists[1 - label][(i + shift) % len(lists[1 - label])]), "",
                             words.LABELS[label])
                     for label in (0, 1) for template, (one, other), (i, adjective), shift in itertools.product(
                         CONTRASTS, CONTRAST_OBJECTS, list(enumerate(lists[label])), range(PARTNERS))),
                    "world contrast")


TASKS: dict[str, Embedded] = {
    "world_contrast": Embedded(world_contrast, SPLITS),
    "world_negation": Embedded(world_negation, SPLITS),
}
