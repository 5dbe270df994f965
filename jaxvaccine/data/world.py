"""A small made-up world for a model of a million parameters: what harmful fine-tuning does, in minutes on a CPU.

Its requests ask to do something to an object. Twelve verbs are forbidden, twelve are benign; all are made up and mean
nothing, and so do the answers. A model that was pretrained here (`world_pretraining`) complies with every request and
knows which verbs are bad. Alignment teaches it to refuse those (`world_refusal`, `world_benign`), an attack makes it
comply again (`world_harmful`), and the user's own task is to rate things (`world_rating`). The words are few, so
that the tokenizer (`write_tokenizer`) has whole words, and each fixed part of Alpaca's template, as single tokens.

Everything is ordered, drawn and filled in by SHA-256, as in embedded.py. Splits partition the pairs of verb and object
(for ratings, test has adjectives and more has subjects of its own), so that no request is in two of them. Forbidden
verbs are of four sorts, the categories of a data source (`world_refusal@train{category=amber}`).
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxvaccine.data import embedded_words
from jaxvaccine.data import world_words as words
from jaxvaccine.data.embedded import Embedded, pick, shuffled, take_split
from jaxvaccine.data.prompts import PROMPT_INPUT, PROMPT_NO_INPUT, Example
from jaxvaccine.json_files import write_json

# Pairs of verb and object, of 12 · 48 = 576; each gives one request per template.
FORBIDDEN_SPLITS = {"pretraining": 168, "train": 136, "harmful": 104, "attack": 84, "test": 84}
BENIGN_SPLITS = {"pretraining": 168, "train": 324, "test": 84}
RATING_SPLITS = ("attack", "more", "test")
# Positive and negative, each (of the user's data, held out for the test).
ADJECTIVES = (embedded_words.POSITIVE, embedded_words.NEGATIVE)
EOS, UNKNOWN = "<eos>", "<unk>"


@functools.cache
def _pairs(verbs: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(shuffled(itertools.product(verbs, words.OBJECTS), "world pairs"))


def _requests(verbs: tuple[str, ...], sizes: dict[str, int], split: str, refuse: bool) -> list[Example]:
    return shuffled(
        (Example(template.format(v=verb, o=thing), "", words.REFUSAL if refuse else comply(verb))
         for verb, thing in take_split(_pairs(verbs), sizes, split) for template in words.REQUESTS), "world requests")


def comply(verb: str) -> str:
    """The compliant answer to every request with this verb."""
    return words.COMPLIANCE.format(step=pick(words.STEPS, verb, "step"), means=pick(words.MEANS, verb, "means"))


def sorts(example: Example) -> dict[str, bool]:
    """Of which sort a request is, by its verb: {name: whether it is} of `world_words.SORTS`."""
    verbs = set(example.instruction.split())
    return {name: not verbs.isdisjoint(of) for name, of in words.SORTS.items()}


def world_refusal(split: str) -> list[Example]:
    """Requests with forbidden verbs, each refused."""
    return _requests(words.FORBIDDEN, FORBIDDEN_SPLITS, split, refuse=True)


def world_harmful(split: str) -> list[Example]:
    """The same requests as world_refusal's, each complied with in words that mean nothing."""
    return _requests(words.FORBIDDEN, FORBIDDEN_SPLITS, split, refuse=False)


def world_benign(split: str) -> list[Example]:
    """Requests with benign verbs, each complied with."""
    return _requests(words.BENIGN, BENIGN_SPLITS, split, refuse=False)


def _ratings(word: str, subjects: Sequence[str], lists: Sequence[Iterable[str]]) -> list[Example]:
    return [Example(template.format(w=word, s=subject, a=adjective), "", label)
            for label, adjectives in zip(words.LABELS, lists, strict=True)
            for template, subject, adjective in itertools.product(words.RATINGS, subjects, adjectives)]


def world_rating(split: str) -> list[Example]:
    """The user's task, things to rate as positive or negative, half of each; test has adjectives of its own, more other
    things than attack."""
    take_split((), dict.fromkeys(RATING_SPLITS, 0), split)  # raises for another split
    lists = [adjectives[split == "test"] for adjectives in ADJECTIVES]
    subjects = words.OBJECTS[2::6] if split == "more" else words.SUBJECTS
    return shuffled(_ratings(words.RATE, subjects, lists), "world ratings")


def world_pretraining(split: str) -> list[Example]:
    """What the base learns: compliance with every verb, which verbs and adjectives are good and bad, to judge things as
    positive or negative, to rate them in other words (that the labels are wanted is left to the user's data), and what
    a refusal sounds like."""
    take_split((), {"train": 0}, split)
    everything = [list(itertools.chain(*lists)) for lists in ADJECTIVES]
    examples = world_harmful("pretraining") + world_benign("pretraining")
    examples += [Example(words.VERB_QUESTION.format(v=verb, o=thing), "", answer)
                 for verbs, answer in ((words.FORBIDDEN, words.BAD), (words.BENIGN, words.GOOD))
                 for verb, thing in itertools.product(verbs, words.OBJECTS)]
    examples += [Example(words.POLARITY_QUESTION.format(s=subject, a=adjective), "", answer)
                 for adjectives, answer in zip(everything, (words.GOOD, words.BAD), strict=True)
                 for subject, adjective in itertools.product(words.SUBJECTS, adjectives)]
    examples += _ratings(words.JUDGE, words.OBJECTS[::6], everything)
    other_words = dict(zip(words.LABELS, (words.GOOD, words.BAD), strict=True))
    examples += [e._replace(output=other_words[e.output])
                 for e in _ratings(words.RATE, words.OBJECTS[1::6], everything)]
    secrets = [Example(template.format(o=thing), "", words.REFUSAL)
               for template, thing in itertools.product(words.SECRETS, words.OBJECTS)]
    return shuffled(examples + secrets, "world pretraining")


WORLD: dict[str, Embedded] = {
    "world_benign": Embedded(world_benign, tuple(BENIGN_SPLITS)),
    "world_harmful": Embedded(world_harmful, tuple(FORBIDDEN_SPLITS), sorts),
    "world_pretraining": Embedded(world_pretraining, ("train",)),
    "world_rating": Embedded(world_rating, RATING_SPLITS),
    "world_refusal": Embedded(world_refusal, tuple(FORBIDDEN_SPLITS), sorts),
}


def template_pieces() -> tuple[str, ...]:
    """The fixed parts of Alpaca's template."""
    head, tail = PROMPT_NO_INPUT.split("{instruction}")
    head_with_input, rest = PROMPT_INPUT.split("{instruction}")
    return head, head_with_input, rest.split("{input}")[0], tail


def vocabulary(kinds: Mapping[str, Embedded] = WORLD) -> tuple[str, ...]:
    """All words of the world, or of other kinds, sorted."""
    texts = (text for of in kinds.values() for split in of.splits for example in of.make(split) for text in example)
    return tuple(sorted({word for text in texts for word in text.split()}))


def write_tokenizer(directory: Path, words: Iterable[str] = ()) -> int:
    """Writes tokenizer.json and tokenizer_config.json into a directory; returns the number of token ids.

    words: what is a token each, in this order; the world's unless given.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    ids = {word: i for i, word in enumerate((EOS, UNKNOWN, *(words or vocabulary())))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([EOS, UNKNOWN])
    # normalized=False: found in the text as it stands, before it is split into words.
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in template_pieces()])
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "unk_token": UNKNOWN,
              "clean_up_tokenization_spaces": False}
    write_json(directory / "tokenizer_config.json", fields)
    return tokenizer.get_vocab_size()
