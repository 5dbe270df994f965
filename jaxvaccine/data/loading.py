"""From a source to its examples: rows, categories, duplicates, slice; and the account of what became of the rows."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from jaxvaccine.data.accounts import Account, Located, describe_bad, locate
from jaxvaccine.data.kinds import ANSWERLESS, DATASETS, EMBEDDED
from jaxvaccine.data.making import Counts, categories_of, make_examples, read
from jaxvaccine.data.poisoning import fingerprint, same_prompt
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.rows import BadRows, NoRowsError
from jaxvaccine.data.selection import Pool, disagree
from jaxvaccine.data.sources import DataSource, Protocol, parse_sources
from jaxvaccine.data.texts import has_prompt, is_blank


def load_examples(source: DataSource | str | Sequence[DataSource], protocol: Protocol = "distinct",
                  bad_rows: BadRows = "error") -> list[Example]:
    """The examples of a source, of a comma-separated list of them, or of a sequence, one after another.

    Every example knows its place (`accounts.Located`). Within a source, rows whose prompt appeared before (see
    `poisoning.same_prompt`) are dropped before the slice applies; of several answers to a prompt the first that is not
    empty counts. A slice leaves out what differs from a row outside of it, and before, in case or Unicode form alone
    (see `poisoning.fingerprint`), so that disjoint slices of one file never share a prompt. With the protocol "rows"
    nothing is dropped, and a slice is of the kind's rows as they are.

    Categories choose rows before any of this: those of one of them; negated, the others, but for those whose prompt a
    row of the former has (its fingerprint), so that a choice and its negation never share a prompt either. With the
    protocol "rows" these stay.

    Rows are read one by one, and no further than a slice between two numbers that are not negative needs: until it is
    full, and none of its answers is empty. Only a negated choice of distinct prompts needs all of them.

    bad_rows: "skip" leaves out rows that cannot be read, and counts them by what is wrong.

    Raises:
      ValueError: no examples of the kind or categories, categories that the data do not have, an empty slice, one that
        reaches beyond the data at either end, a column that looks like a part of the prompt and is not read; and what
        iter_rows and the data sets' modules raise.
      FileNotFoundError: no such file.
    """
    return load(source, protocol, bad_rows)[0]


def load(source: DataSource | str | Sequence[DataSource], protocol: Protocol = "distinct", bad_rows: BadRows = "error"
         ) -> tuple[list[Example], tuple[Account, ...]]:
    """The examples of `load_examples`, and every source's account."""
    if isinstance(source, str):
        source = parse_sources(source)
    examples: list[Example] = []
    accounts, seen = [], set()
    for one in [source] if isinstance(source, DataSource) else source:
        found = _load(one, protocol, bad_rows)
        prompts = [same_prompt(example) for example in found if has_prompt(example)]
        account = found[0].account._replace(repeated=len(prompts) - len({*prompts} - seen))
        examples += [locate(e, e.where, e.columns, account) for e in found] if account.repeated else found
        accounts.append(account)
        seen.update(prompts)
    return examples, tuple(accounts)


def _load(source: DataSource, protocol: Protocol, bad_rows: BadRows = "error") -> list[Located]:
    counts, pool = Counts(), Pool(source, protocol == "distinct", source.kind not in ANSWERLESS)
    try:
        for one in make_examples(source, counts, bad_rows):
            if pool.take(one) and source.kind not in EMBEDDED:  # those are there: all of them are counted
                break
        else:
            pool.end()
    except NoRowsError:
        if not counts.bad:
            raise
    bad = sum(counts.bad.values())
    account = Account(
        str(source), counts.rows + bad, counts.left_out, pool.duplicates, pool.disagreeing, unread=tuple(counts.unread),
        other_category=pool.other_category, bad=tuple(sorted(counts.bad.items())), partly=not pool.ended)
    why = [f"{pool.duplicates} duplicates"] * bool(pool.duplicates)
    if bad:
        why.append(f"{bad} bad rows, the first is {counts.first_bad}")
        logging.getLogger(__name__).warning("data source %s: left out %d of %d rows: %s", source, bad, account.rows,
                                            describe_bad(account))
    taken, sliced = pool.slice(f" ({account.rows} rows, {', '.join(why)})" if why else "")
    first = first_answers([one.example for one in taken])
    account = account._replace(outside=pool.unique - sliced, variants=sliced - len(taken), examples=len(taken),
                               prompts=len(first))
    if not pool.distinct:
        account = account._replace(disagreeing=sum(
            disagree(one.example, answer) for one in taken if (answer := first.get(same_prompt(one.example)))))
    return [locate(*one[:3], account) for one in taken]


def first_answers(examples: Sequence[Example]) -> dict[tuple[str, ...], Example]:
    """{prompt: its first example with an answer, or without any its first}."""
    found: dict[tuple[str, ...], Example] = {}
    for example in examples:
        if has_prompt(example):
            first = found.setdefault(same_prompt(example), example)
            if is_blank(first.output):
                found[same_prompt(example)] = example
    return found


def load_categories(sources: str | Sequence[DataSource], bad_rows: BadRows = "error") -> dict[str, tuple[str, ...]]:
    """{fingerprint of a prompt: its kinds of harm, sorted} of all prompts in the sources that have any.

    They are BeaverTails' column `category`, {name: bool}, in whichever kind of data it occurs, XSTest's types and
    OR-Bench's categories, and the small world's sorts. A prompt that several rows of its kind hold has the kinds of
    harm of all of them. Slices and the categories that a source chooses make no difference.
    Formats that have no room for BeaverTails' column, such as CSV, have none of it.

    Raises:
      ValueError, FileNotFoundError: as of `load_examples`.
    """
    found: dict[str, set[str]] = {}
    for source in parse_sources(sources) if isinstance(sources, str) else sources:
        kind = EMBEDDED.get(source.kind)
        if source.path:
            # All rows, whatever the slice: a prompt's others have kinds of harm too.
            rows = read(source, Counts(), bad_rows, stream=False)
            make, categories = DATASETS[source.kind], functools.partial(categories_of, source.kind)
        else:
            rows, make, categories = kind.make(source.split) if kind.categories else (), list, kind.categories
        for row in rows:
            names = {name for name, holds in categories(row).items() if holds}
            for example in _examples(make, row, bad_rows) if names else ():
                found.setdefault(fingerprint(example), set()).update(names)
    return {prompt: tuple(sorted(names)) for prompt, names in found.items()}


def _examples(make: Callable[[Sequence[Any]], list[Example]], row: Any, bad_rows: BadRows) -> list[Example]:
    try:
        return make([row])
    except ValueError:
        if bad_rows == "error":
            raise
        return []
