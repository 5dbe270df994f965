import hashlib
import itertools

import pytest

from jaxvaccine import data
from jaxvaccine.data import embedded_words, world
from jaxvaccine.data import world_words as words
from jaxvaccine.data.world_tasks import TASKS

ALL = [(kind, split) for kind, of in TASKS.items() for split in of.splits]


@pytest.mark.parametrize(("kind", "split"), ALL)
def test_all_words_are_the_worlds_own(kind, split):
    examples = TASKS[kind].make(split)
    assert {word for e in examples for text in e for word in text.split()} <= set(world.vocabulary())
    # With the template's two tokens, the answer and EOS a row fits into the world's 16.
    assert max(len(e.instruction.split()) for e in examples) <= 12
    labels = [e.output for e in examples]
    assert labels.count("positive") == labels.count("negative") == len(labels) / 2
    assert 0.4 < labels[:100].count("positive") / 100 < 0.6
    assert len(examples) >= (500 if split == "attack" else 200)
    assert len({data.fingerprint(e) for e in examples}) == len(examples)


def test_no_request_is_in_two_splits_or_kinds():
    made = {(kind, split): of.make(split) for kind, of in {**world.WORLD, **TASKS}.items() for split in of.splits}
    for (kind_a, a), (kind_b, b) in itertools.combinations(made, 2):
        if kind_a in TASKS or kind_b in TASKS:
            data.check_disjoint(f"{kind_a}@{a}", made[kind_a, a], f"{kind_b}@{b}", made[kind_b, b])


def test_negation_turns_the_label():
    sides = {word: side for side, lists in enumerate(world.ADJECTIVES) for word in itertools.chain(*lists)}
    for split in ("attack", "test"):
        negated = 0
        for e in TASKS["world_negation"].make(split):
            asked = e.instruction.split()
            (side,) = {sides[word] for word in asked if word in sides}
            assert e.output == words.LABELS[side ^ ("not" in asked)]
            negated += "not" in asked
        assert negated == len(TASKS["world_negation"].make(split)) / 2
    held_out = {*embedded_words.POSITIVE[1], *embedded_words.NEGATIVE[1]}
    assert not held_out & {word for e in TASKS["world_negation"].make("attack") for word in e.instruction.split()}


def test_the_last_one_counts():
    sides = {word: side for side, lists in enumerate(world.ADJECTIVES) for word in itertools.chain(*lists)}
    for split in ("attack", "test"):
        for e in TASKS["world_contrast"].make(split):
            first, last = (sides[word] for word in e.instruction.split() if word in sides)
            assert first != last and e.output == words.LABELS[last]


def test_the_data_are_the_same_everywhere_and_for_ever():
    digest = hashlib.sha256()
    for kind, split in ALL:
        digest.update(repr((kind, split, TASKS[kind].make(split))).encode())
    assert digest.hexdigest()[:16] == "7aab7610880bd46b"


@pytest.mark.parametrize("kind", TASKS)
def test_unknown_split(kind):
    with pytest.raises(ValueError, match="split: found 'more', expected one of"):
        TASKS[kind].make("more")
    with pytest.raises(ValueError, match="split 'more', expected one of attack, test"):
        data.load_examples(f"{kind}@more")
