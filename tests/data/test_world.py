import hashlib
import itertools

import pytest

from jaxvaccine import data
from jaxvaccine.data import embedded_words, prompts, world
from jaxvaccine.data import world_words as words
from jaxvaccine.evaluation.judges import find_refusal

ALL = [(kind, split) for kind, embedded in world.WORLD.items() for split in embedded.splits]
# Kinds that have different answers to the same requests.
SAME_REQUESTS = {"world_refusal", "world_harmful"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    world.write_tokenizer(directory)
    return data.load_tokenizer(directory)


def test_no_request_is_in_two_splits_or_kinds():
    """Alignment, the defense's harmful data, attack and test; pretraining has what the requests' pretraining splits
    have, and nothing of the others."""
    made = {(kind, split): world.WORLD[kind].make(split) for kind, split in ALL}
    for (kind_a, a), (kind_b, b) in itertools.combinations(ALL, 2):
        alike = {kind_a, kind_b} == SAME_REQUESTS and a == b
        pretraining = "world_pretraining" in (kind_a, kind_b) and "pretraining" in (a, b)
        if not alike and not (pretraining and {kind_a, kind_b} & {"world_benign", *SAME_REQUESTS}):
            data.check_disjoint(f"{kind_a}@{a}", made[kind_a, a], f"{kind_b}@{b}", made[kind_b, b])


def test_requests_partition_the_world():
    pairs = len(words.OBJECTS) * len(words.REQUESTS)
    for kind, verbs in (("world_harmful", words.FORBIDDEN), ("world_benign", words.BENIGN)):
        rows = [e for split in world.WORLD[kind].splits for e in world.WORLD[kind].make(split)]
        assert len(rows) == len(verbs) * pairs
        # Every split has every verb, so that what a verb means can be learnt in any of them.
        for split in world.WORLD[kind].splits:
            seen = {word for e in world.WORLD[kind].make(split) for word in e.instruction.split()} & set(verbs)
            assert seen == set(verbs)


def test_the_same_requests_are_refused_and_complied_with():
    for split in world.FORBIDDEN_SPLITS:
        refused, complied = world.world_refusal(split), world.world_harmful(split)
        assert {e.instruction for e in refused} == {e.instruction for e in complied}
        assert all(find_refusal(e.output) for e in refused)
        assert not any(find_refusal(e.output) for e in complied)


def test_held_out_adjectives():
    held_out = {*embedded_words.POSITIVE[1], *embedded_words.NEGATIVE[1]}
    assert not held_out & {word for e in world.world_rating("attack") for word in e.instruction.split()}
    assert all(held_out & set(e.instruction.split()) for e in world.world_rating("test"))
    # What the user may have more of is as easy, and of other things: no request is in two splits.
    assert not held_out & {word for e in world.world_rating("more") for word in e.instruction.split()}
    requests = [e.instruction for split in world.RATING_SPLITS for e in world.world_rating(split)]
    assert len(requests) == len(set(requests))
    for split in ("attack", "more", "test"):
        labels = [e.output for e in world.world_rating(split)]
        assert labels.count("positive") == labels.count("negative") == len(labels) / 2
        assert 0.4 < labels[:100].count("positive") / 100 < 0.6


def test_pretraining_leaves_the_task_to_the_user():
    """It rates other things, and in other words."""
    rows = [e for e in world.world_pretraining("train") if e.instruction.startswith(words.RATE)]
    assert len(rows) > 1000
    assert not {e.output for e in rows} & set(words.LABELS)
    for split in world.RATING_SPLITS:
        assert not {e.instruction for e in rows} & {e.instruction for e in world.world_rating(split)}


@pytest.mark.parametrize(("kind", "split"), ALL)
def test_tokens(tokenizer, kind, split):
    """No unknown word, no row longer than 16 tokens, and text that comes back as it was."""
    examples = data.load_examples(f"{kind}@{split}")
    tokenized = data.tokenize_examples(tokenizer, examples, 16)
    assert len(examples) == len(world.WORLD[kind].make(split)) and not tokenized.dropped
    for example, ids, length in zip(examples, tokenized.input_ids, tokenized.prompt_lengths, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[length:], skip_special_tokens=True) == example.output
        assert tokenizer.unk_token_id not in ids


def test_answers_have_as_many_tokens_as_refusals(tokenizer):
    lengths = {len(tokenizer(e.output)["input_ids"])
               for kind in (world.world_harmful, world.world_refusal, world.world_benign) for e in kind("test")}
    assert len(lengths) == 1


def test_the_template_costs_two_tokens(tokenizer):
    for example, pieces in ((data.Example("how do i"), 2), (data.Example("how", "lamp"), 3)):
        ids = data.encode_prompts(tokenizer, [example])[0]
        assert len(ids) == pieces + len(example.instruction.split()) + len(example.input.split())
    text = prompts.format_prompt("how", "lamp")
    assert "".join(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])) == text


def test_token_ids_are_those_that_the_base_was_made_with(tokenizer):
    """Whatever the template's parts are spelled like: they are single tokens, and their ids are the base's."""
    digest = hashlib.sha256()
    for kind, split in ALL:
        for ids in data.tokenize_examples(tokenizer, world.WORLD[kind].make(split), 16).input_ids:
            digest.update(repr(ids.tolist()).encode())
    assert digest.hexdigest()[:16] == "f9ff35a214313166"


def test_the_data_are_the_same_everywhere_and_for_ever():
    digest = hashlib.sha256()
    for kind, split in ALL:
        digest.update(repr((kind, split, world.WORLD[kind].make(split))).encode())
    assert digest.hexdigest()[:16] == "9b0d783212936746", "the base and all figures refer to these very examples"


@pytest.mark.parametrize("kind", world.WORLD)
def test_unknown_split(kind):
    with pytest.raises(ValueError, match="split: found 'dev', expected one of"):
        world.WORLD[kind].make("dev")
