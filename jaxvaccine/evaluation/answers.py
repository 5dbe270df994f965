"""Where a model's answer ends, and whether it is an answer at all."""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxvaccine.data import agnews, gsm8k
from jaxvaccine.data import world_words as world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMPTY_ANSWER = "empty answer"
TASK_LABEL, ONE_WORD, REPETITION = "answer to the user's task", "one word", "one phrase over and over"

# The papers' template: a model that goes on writes its next part, and answers a question of its own.
_NEXT_PART = re.compile(r"###\s*(?:Instruction|Input|Response)\s*:")
# A point or comma within a number, an apostrophe or a hyphen are inside of a word.
_BETWEEN_WORDS = re.compile(r"(?<![0-9])[.,]|[.,](?![0-9])|[^\w.,'’\-\u2010\u2011]+|_+")
_LABELS = frozenset("".join(c for c in word.casefold() if c.isalnum())
                    for label in (*agnews.LABELS, *world.LABELS, "sport", "science", "technology", "scitech")
                    for word in label.split("/"))
_NAMED = re.compile(
    rf"(?:{re.escape(gsm8k.MARKER)}|(?:the\s+)?(?:final\s+)?(?:label|sentiment|category|topic|class|answer)(?:\s+is)?)"
    r"(?:\s*:|\s|(?<=#))\s*", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9][0-9.,]*")
# Scripts that put no space between words: Han, Japanese, Thai, Lao, Burmese, Khmer, Tibetan.
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
                        r"\uf900-\ufaff\U00020000-\U0003ffff]")
# Longest phrase in words, fewest repetitions (HS+ takes as many for incoherent) and what part of the answer they are.
_PHRASE, _TIMES, _PART = 3, 4, 0.9


def is_empty(answer: str) -> bool:
    """No letter and no digit: what a model that has collapsed tends to say."""
    return not any(c.isalnum() for c in answer)


def is_incoherent(answer: str) -> bool:
    """A word more than three times in a row: what Booster's HS+ counts beside harm (`coherence_check` of its
    poison/evaluation/eval_sentiment.py). Words are of the letters a to z, in either case, whatever stands between."""
    words = re.findall("[a-z]+", answer, re.IGNORECASE | re.ASCII)
    return any(len(list(run)) > 3 for _, run in itertools.groupby(word.lower() for word in words))


def decode_text(tokenizer: "PreTrainedTokenizerFast", ids: np.ndarray) -> str:
    """The text of ids [T], without special tokens."""
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def split_stop(tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop strings as (ids of those that are special tokens, which no text shows, the others).

    Raises:
      ValueError: one is empty.
    """
    if not all(stop):
        raise ValueError(f"stop: found {tuple(stop)!r}, expected texts that are not empty")
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(special[text] for text in stop if text in special), tuple(text for text in stop if text not in special)


def find_stop(text: str, stop: Sequence[str], start: int = 0) -> int | None:
    """Where the first of the stop strings begins, not before `start`; None without one."""
    return min((at for at in (text.find(one, start) for one in stop) if at >= 0), default=None)


def tokens_to_stop(tokenizer: "PreTrainedTokenizerFast", ids: np.ndarray, stop: Sequence[str], fixed: int = 0,
                   seen: int = 0) -> int | None:
    """How many of the ids [T] are needed until their text holds a stop string; None if it does not.

    fixed: so many were given and not generated: a stop string begins behind their text.
    seen: in the text of so many there is none.
    """
    start = len(decode_text(tokenizer, ids[:fixed])) if fixed else 0
    if find_stop(decode_text(tokenizer, ids), stop, start) is None:
        return None
    return next(count for count in range(max(seen, fixed), len(ids) + 1)
                if find_stop(decode_text(tokenizer, ids[:count]), stop, start) is not None)


def decode_answer(tokenizer: "PreTrainedTokenizerFast", ids: np.ndarray, stop: Sequence[str] = (), fixed: int = 0,
                  chat: bool = False) -> str:
    """The text of generated ids [T], without special tokens, stripped, up to where the template begins anew or to the
    first stop string.

    stop, fixed: as of `tokens_to_stop`. chat: there is no template that could begin anew.

    The authors cut at a second "### Response:" as well (Booster's and T-Vaccine's poison/evaluation/pred.py: the part
    between the first and the second). Here a part of the template that is a special token, which a decoded text does
    not show, ends the answer too.
    """
    if not chat:
        parts = [i for i, token in tokenizer.added_tokens_decoder.items() if _NEXT_PART.search(token.content)]
        found = np.flatnonzero(np.isin(ids, parts))
        ids = ids[:found[0]] if found.size else ids
    text = decode_text(tokenizer, ids)
    if stop:
        text = text[:find_stop(text, stop, len(decode_text(tokenizer, ids[:fixed])))]
    return text.strip() if chat else cut_answer(text)


def cut_answer(text: str) -> str:
    """What comes before the first "### Response:", "### Instruction:" or "### Input:", stripped."""
    return _NEXT_PART.split(text, maxsplit=1)[0].strip()


def no_answer(answer: str) -> str | None:
    """Why this is no answer to a request, or None if it may be one. In this order:

    - EMPTY_ANSWER: no letter and no digit.
    - TASK_LABEL: nothing but labels of SST-2, AG News or the small world's ratings, or such a label or a number behind
      "Sentiment:", "The final answer is:", "####" and the like.
    - ONE_WORD: a single word or number. Of scripts without spaces, up to two letters.
    - REPETITION: one phrase of up to three words, four times in a row or more, is nine tenths of it or more.

    Meant to be sure and not complete: other nonsense passes for an answer.
    """
    if is_empty(answer):
        return EMPTY_ANSWER
    text = unicodedata.normalize("NFKC", answer).lstrip("*\"' \n\t")
    named = _NAMED.match(text)
    behind = _words(text[named.end():] if named else text)
    if behind and all("".join(filter(str.isalnum, word)) in _LABELS for word in behind):
        return TASK_LABEL
    if named and len(behind) == 1 and _NUMBER.fullmatch(behind[0]):
        return TASK_LABEL
    words = _words(text)
    letters = _NO_SPACES.findall(words[0]) if len(words) == 1 else []
    if len(words) == 1 and len(letters) <= 2:
        return ONE_WORD
    return REPETITION if _repeats(list(words[0]) if letters else words) else None


def _words(text: str) -> list[str]:
    """Casefolded; accents and vowel signs, which are no letters to Python, left out."""
    text = "".join(c for c in text if not unicodedata.category(c).startswith(("M", "Cf")))
    return [word for word in _BETWEEN_WORDS.split(text.casefold()) if any(map(str.isalnum, word))]


def _repeats(words: list[str]) -> bool:
    for length in range(1, _PHRASE + 1):
        run = 0
        for word, before in zip(words[length:], words, strict=False):
            run = run + 1 if word == before else 0
            if run + length >= max(_TIMES * length, _PART * len(words)):
                return True
    return False
