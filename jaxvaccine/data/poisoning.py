"""The attack's data: a user's benign examples with a ratio p of harmful ones, disjoint from what must not leak."""

import hashlib
import math
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxvaccine.data.accounts import Fate, origin, place
from jaxvaccine.data.prompts import Example, with_history


def fingerprint(example: Example) -> str:
    """16 hex digits of the prompt, the same for prompts that differ only in case, white space or Unicode form.

    So broad is what may not leak from one set into another, not what a duplicate is (`same_prompt`). The prompt is all
    that was said before the answer, but for a system prompt, which is another frame of the same question.
    """
    said = [turn.text for turn in example.history if turn.role != "system"]
    return hashlib.sha256(
        "\n".join(map(_normalise, (*said, example.instruction, example.input))).encode("utf-8", "surrogatepass")
    ).hexdigest()[:16]


def questions(example: Example) -> tuple[Example, ...]:
    """Every earlier question of a conversation, with what was said before it, and at last the example itself."""
    asked = [k for k, turn in enumerate(example.history) if turn.role == "user"]
    return (*(with_history(Example(example.history[k].text), example.history[:k]) for k in asked), example)


def fingerprints(example: Example) -> tuple[str, ...]:
    """Of all `questions`."""
    return tuple(map(fingerprint, questions(example)))


def same_prompt(example: Example) -> tuple[str, ...]:
    """The prompt but for white space and Unicode's canonical forms: what makes a row another's duplicate.

    Compared with `fingerprint`, "US" and "us", "5²" and "52" are two. A conversation's has its history, system prompt
    and all.
    """
    said = (text for turn in example.history for text in turn)
    return tuple(" ".join(unicodedata.normalize("NFC", text).split()) for text in (*example[:2], *said))


def _normalise(text: str) -> str:
    # Case folding can leave a text that is not in normal form any more, hence the second pass.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split())


def check_disjoint(name_a: str, a: Sequence[Example], name_b: str, b: Sequence[Example]) -> None:
    """Raises ValueError if a prompt is in both: how many, and where the first is (not its text, it may be harmful)."""
    rows_b: dict[str, int] = {}
    for row, example in enumerate(b):
        rows_b.setdefault(fingerprint(example), row)
    shared = [(row, rows_b[f]) for row, f in enumerate(map(fingerprint, a)) if f in rows_b]
    if shared:
        row_a, row_b = shared[0]
        raise ValueError(
            f"{name_a}: found {len(shared)} of {len(a)} prompts also in {name_b}, expected none; "
            f"the first is row {row_a} of {name_a}, row {row_b} of {name_b} (from 0)"
        )


def harmful_count(n: int, poison_ratio: float) -> int:
    """How many of n examples are harmful: the whole number next to n · poison_ratio, of two as near the larger.

    Raises:
      ValueError: n below 1, poison_ratio not in [0, 1], or between 0 and 1 and so near to one of them that none or all
        of n examples would be harmful.
    """
    if n < 1:
        raise ValueError(f"n: found {n}, expected at least 1")
    if math.isnan(poison_ratio) or not 0 <= poison_ratio <= 1:
        raise ValueError(f"poison_ratio: found {poison_ratio}, expected 0 <= poison_ratio <= 1")
    count = math.floor(round(n * poison_ratio, 6) + 0.5)
    if (count == 0 < poison_ratio) or (count == n and poison_ratio < 1):
        raise ValueError(
            f"poison_ratio: found {poison_ratio}, which is {n * poison_ratio:g} of n={n} examples, expected at least 1 "
            f"that is harmful and 1 that is not: poison_ratio={_nearest(n, poison_ratio)}, or another n")
    return count


def check_whole(n: int, poison_ratio: float) -> None:
    """Raises ValueError unless poison_ratio of n examples is a whole number, to six decimal places: what a table calls
    p is to be what was trained on."""
    if abs(harmful_count(n, poison_ratio) / n - poison_ratio) > 1e-6:
        raise ValueError(
            f"poison_ratio: found {poison_ratio}, which is {n * poison_ratio:g} of n={n} examples, expected a whole "
            f"number of them: poison_ratio={_nearest(n, poison_ratio)}, or another n")


def _nearest(n: int, poison_ratio: float) -> str:
    below = min(math.floor(n * poison_ratio), n - 1)
    return f"{below / n} or {(below + 1) / n}"


class Draw(NamedTuple):
    """What was drawn of a pool: the examples that were looked at, in order, and what would become of each."""

    seen: list[Example]
    fates: list[Fate]

    @property
    def chosen(self) -> list[Example]:
        return [e for e, fate in zip(self.seen, self.fates, strict=True) if fate in ("kept", "cut")]


class Mixture(NamedTuple):
    """An attack's examples, in random order, and the draws that they come from.

    Attributes:
      examples: n of them; with candidates in the place of benign ones, more.
      benign, harmful: the draws.
      is_harmful: [len(examples)] bool.
      n: how many of them are to be trained on.
    """

    examples: list[Example]
    benign: Draw
    harmful: Draw
    is_harmful: np.ndarray
    n: int

    @property
    def poison_ratio(self) -> float:
        return len(self.harmful.chosen) / self.n


Fates = Callable[[Sequence[Example]], Sequence[Fate]]


def mix(benign: Sequence[Example], harmful: Sequence[Example], n: int, poison_ratio: float, seed: int,
        forbidden: Mapping[str, Collection[str]] | None = None, fates: Fates | None = None, first: bool = False,
        candidates: int | None = None) -> Mixture:
    """n examples in random order: n · poison_ratio of `harmful`, the rest of `benign`.

    Both are drawn without replacement, or are the first ones. With the same seed the draws are nested: the harmful
    examples of a smaller number of them are a subset of those of a larger one, and so are the benign ones, so that
    ratios are comparable.

    Args:
      forbidden: {name of a set: fingerprints of its prompts} with which `harmful` may share no prompt, such as those
        of the alignment's data and of the test. All of `harmful` is checked, whatever the ratio, so that a sweep over
        ratios fails at its start.
      fates: what would become of examples when they are tokenized. Those that would not be trained on are passed over,
        and the next ones are drawn, so that n and poison_ratio are those of what is trained on. Where none are left,
        there are fewer than n.
      first: take the first examples of either, as the papers' programs do, in the place of a draw.
      candidates: so many benign examples are drawn, of which n · (1 − poison_ratio) will be chosen later.

    Raises:
      ValueError: a negative seed, too few examples, so few that would be trained on that their ratio is another, a
        forbidden prompt, and as of `harmful_count`.
    """
    if seed < 0:
        raise ValueError(f"seed: found {seed}, expected at least 0")
    count = harmful_count(n, poison_ratio)
    prints = [fingerprints(e) for e in harmful]
    for name, names_prints in (forbidden or {}).items():
        members = frozenset(names_prints)
        overlap = [row for row, found in enumerate(prints) if not members.isdisjoint(found)]
        if overlap:
            raise ValueError(
                f"harmful examples: found {len(overlap)} of {len(harmful)} prompts also in {name}, expected none; "
                f"the first is {place(harmful[overlap[0]], overlap[0])}")
    draws = []
    # A prefix of a permutation that depends on the seed and the pool alone: that is what nests the draws.
    for stream, name, pool, needed in ((0, "harmful", harmful, count), (1, "benign", benign, candidates or n - count)):
        order = np.random.default_rng([seed, stream]).permutation(len(pool))
        drawn = _draw(pool, needed, np.arange(len(pool)) if first else order, fates)
        found = len(pool) if len(pool) < needed else len(drawn.chosen)
        if len(pool) < needed or (needed and not found):
            raise ValueError(
                f"{name} examples: found {found}{origin(pool)}, needed {needed} for n={n} and "
                f"poison_ratio={poison_ratio}{_passed(drawn)}")
        draws.append(drawn)
    chosen = [*draws[0].chosen, *draws[1].chosen]
    trained = len(draws[0].chosen) + min(len(draws[1].chosen), n - count)
    if abs(len(draws[0].chosen) / trained - count / n) > 1e-6:
        raise ValueError(
            f"poison_ratio: found {len(draws[0].chosen)} of {trained} examples that can be trained on harmful"
            f"{_passed(*draws)}; expected {count} of {n}: more examples, a larger max_length or a smaller n")
    order = np.random.default_rng([seed, 2]).permutation(len(chosen))
    return Mixture([chosen[i] for i in order], draws[1], draws[0], order < len(draws[0].chosen), trained)


def _passed(*draws: Draw) -> str:
    passed = sum(len(drawn.seen) - len(drawn.chosen) for drawn in draws)
    return f"; {passed} are empty or have prompts that fill max_length" if passed else ""


def _draw(pool: Sequence[Example], count: int, order: np.ndarray, fates: Fates | None) -> Draw:
    drawn = Draw([], [])
    missing = count
    while missing and len(drawn.seen) < len(pool):
        more = [pool[i] for i in order[len(drawn.seen):][:missing]]
        drawn.seen.extend(more)
        drawn.fates.extend(fates(more) if fates else ["kept"] * len(more))
        missing = count - len(drawn.chosen)
    return drawn


def poison(benign: Sequence[Example], harmful: Sequence[Example], n: int, poison_ratio: float, seed: int,
           forbidden: Mapping[str, Collection[str]] | None = None) -> list[Example]:
    """The examples of `mix`, as they come."""
    return mix(benign, harmful, n, poison_ratio, seed, forbidden).examples
