"""Which examples of a source are handed on: those of its categories, every prompt once, those of its slice."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from jaxvaccine.data.poisoning import fingerprint, same_prompt
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.sources import DataSource
from jaxvaccine.data.texts import has_prompt, is_blank


class Made(NamedTuple):
    """An example that a row, or the package, made: not yet located, since the account counts all of them."""

    example: Example
    where: str
    columns: tuple[str, str, str]
    categories: Mapping[str, bool] = MappingProxyType({})  # of a source that chooses among them


class Pool:
    """What is kept of a source's examples, which are given one by one.

    A slice between two numbers that are not negative needs no more than its stop, unless one of its answers is empty,
    which a later row of the same prompt may fill. A negated choice of distinct prompts needs all: any row can tell that
    a prompt has a category.

    Attributes:
      unique: how many different prompts, or with rows as they are how many examples, there are.
      duplicates, disagreeing, other_category: as of `accounts.Account`.
      ended: whether all examples were given.
    """

    def __init__(self, source: DataSource, distinct: bool, answered: bool = True):
        """answered: whether an empty answer may be filled by a later row."""
        self.source, self.distinct, self.answered = source, distinct, answered
        self.unique = self.duplicates = self.disagreeing = self.other_category = 0
        self.ended = False
        self._kept: list[Made] = []  # up to the slice's stop
        self._places: dict[tuple[str, ...], int] = {}  # of the prompts
        self._known: set[str] = set()  # names of categories
        self._unanswered: set[int] = set()
        self._held: list[Made] = []  # of a negated choice, until it is known which prompts have its categories
        self._chosen: set[str] = set()

    def take(self, one: Made) -> bool:
        """Takes an example in; whether no more are needed."""
        if self.source.categories:
            self._known.update(one.categories)
            chosen = any(one.categories.get(name) for name in self.source.categories)
            if self.source.negated and self.distinct:
                if not chosen:
                    self._held.append(one)
                    return False
                self.other_category += 1
                if has_prompt(one.example):
                    self._chosen.add(fingerprint(one.example))
                return False
            if chosen == self.source.negated:
                self.other_category += 1
                return False
        self._keep(one)
        return self._is_full()

    def end(self) -> None:
        """There are no more."""
        self.ended = True
        for one in self._held:
            if fingerprint(one.example) in self._chosen:
                self.other_category += 1
            else:
                self._keep(one)
        self._held = []

    def _keep(self, one: Made) -> None:
        stop = self.source.needed
        at = self.unique
        if self.distinct and has_prompt(one.example):  # those without a prompt are nobody's duplicates
            at = self._places.setdefault(same_prompt(one.example), self.unique)
        if at < self.unique:
            self.duplicates += 1
            if stop is not None and at >= stop:
                return
            if at in self._unanswered and not is_blank(one.example.output):
                self._kept[at] = one
                self._unanswered.discard(at)
            else:
                self.disagreeing += disagree(one.example, self._kept[at].example)
            return
        self.unique += 1
        if stop is None or at < stop:
            self._kept.append(one)
            if self.distinct and is_blank(one.example.output):
                self._unanswered.add(at)

    def _is_full(self) -> bool:
        stop = self.source.needed
        if stop is None or self.unique < stop or not self._known.issuperset(self.source.categories):
            return False
        start = self.source.start or 0
        if start >= stop:
            return False  # an empty slice, of how many examples
        return not (self.answered and any(start <= i and has_prompt(self._kept[i].example) for i in self._unanswered))

    def slice(self, lost: str) -> tuple[list[Made], int]:
        """(the examples of the slice, how many it has with the variants of prompts before it, which are left out).

        lost: why there are no more, for errors.

        Raises:
          ValueError: categories that there are not, no examples, an empty slice, or one that reaches beyond them.
        """
        source, place = self.source, f"data source {self.source}"
        if source.categories and not self._known:
            raise ValueError(f"{place}: found no column 'category' with names and true or false, expected one to "
                             "choose by")
        if unknown := [name for name in source.categories if name not in self._known]:
            raise ValueError(
                f"{place}: found category {unknown[0]!r}, expected one of {'; '.join(sorted(self._known))}")
        if not self.unique:
            what = "these categories" if source.categories else "this kind"
            raise ValueError(f"{place}: found no rows of {what}{lost}, expected at least one")
        if source.stop is not None and source.stop > self.unique:
            raise ValueError(f"{place}: found stop {source.stop}, expected at most {self.unique} examples{lost}")
        if source.start is not None and source.start < -self.unique:
            raise ValueError(f"{place}: found start {source.start}, expected at least -{self.unique}{lost}")
        sliced = range(self.unique)[source.start : source.stop]
        taken = _without_variants([one.example for one in self._kept], sliced) if self.distinct else list(sliced)
        if not taken:
            variants = f", {len(sliced)} of them variants of prompts before it" if sliced else ""
            raise ValueError(f"{place}: found an empty slice of {self.unique} examples{lost}{variants}, expected some")
        return [self._kept[i] for i in taken], len(sliced)


def disagree(duplicate: Example, example: Example) -> bool:
    return not is_blank(duplicate.output) and duplicate.output.split() != example.output.split()


def _without_variants(examples: Sequence[Example], sliced: range) -> list[int]:
    """The examples of the slice, but those whose fingerprint an example before the slice's, outside of it, has."""
    if len(sliced) == len(examples):
        return list(sliced)
    first: dict[str, int] = {}
    taken = []
    for i, example in enumerate(examples[: sliced.stop]):
        owner = first.setdefault(fingerprint(example), i) if has_prompt(example) else i
        if i in sliced and owner in sliced:
            taken.append(i)
    return taken
