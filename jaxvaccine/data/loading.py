"""From a source to its examples: rows, categories, duplicates, slice; and the account of what became of the rows."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxvaccine.data.accounts import Account, Located, locate
from jaxvaccine.data.files import read_rows
from jaxvaccine.data.instructions import INSTRUCTION_COLUMNS
from jaxvaccine.data.kinds import DATASETS, EMBEDDED
from jaxvaccine.data.poisoning import fingerprint, same_prompt
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.rows import Watched
from jaxvaccine.data.sources import DataSource, Protocol, parse_sources
from jaxvaccine.data.texts import has_prompt, is_blank

# Columns that belong to a prompt. Where nobody reads them, the rows are not the ones that their makers meant.
PROMPT_PARTS = frozenset((
    "context", "input", "inputs", "system", "system_prompt", "system_message", "history", "conversation",
    "conversations", "messages", "dialog", "dialogue", "turns", "passage", "document", "background", "choices",
    "options"))  # fmt: skip
# What a plain instruction file may have beside the one that is read.
_OF_INSTRUCTIONS = frozenset((*INSTRUCTION_COLUMNS, "query", "task"))


class _Made(NamedTuple):
    """An example that a row, or the package, made: not yet located, since the account counts all of them."""

    example: Example
    where: str
    columns: tuple[str, str, str]
    categories: Mapping[str, bool] = MappingProxyType({})  # of a source that chooses among them


def load_examples(source: DataSource | str | Sequence[DataSource], protocol: Protocol = "distinct") -> list[Example]:
    """The examples of a source, of a comma-separated list of them, or of a sequence, one after another.

    Every example knows its place (`accounts.Located`). Within a source, rows whose prompt appeared before (see
    `poisoning.same_prompt`) are dropped before the slice applies; of several answers to a prompt the first that is not
    empty counts. A slice leaves out what differs from a row outside of it, and before, in case or Unicode form alone
    (see `poisoning.fingerprint`), so that disjoint slices of one file never share a prompt. With the protocol "rows"
    nothing is dropped, and a slice is of the kind's rows as they are.

    Categories choose rows before any of this: those of one of them; negated, the others, but for those whose prompt a
    row of the former has (its fingerprint), so that a choice and its negation never share a prompt either. With the
    protocol "rows" these stay.

    Raises:
      ValueError: no examples of the kind or categories, categories that the data do not have, an empty slice, one that
        reaches beyond the data at either end, a column that looks like a part of the prompt and is not read; and what
        read_rows and the data sets' modules raise.
      FileNotFoundError: no such file.
    """
    return load(source, protocol)[0]


def load(source: DataSource | str | Sequence[DataSource], protocol: Protocol = "distinct"
         ) -> tuple[list[Example], tuple[Account, ...]]:
    """The examples of `load_examples`, and every source's account."""
    if isinstance(source, str):
        source = parse_sources(source)
    examples: list[Example] = []
    accounts, seen = [], set()
    for one in [source] if isinstance(source, DataSource) else source:
        found = _load(one, protocol)
        prompts = [same_prompt(example) for example in found if has_prompt(example)]
        account = found[0].account._replace(repeated=len(prompts) - len({*prompts} - seen))
        examples += [locate(e, e.where, e.columns, account) for e in found] if account.repeated else found
        accounts.append(account)
        seen.update(prompts)
    return examples, tuple(accounts)


def _load(source: DataSource, protocol: Protocol) -> list[Located]:
    if source.kind in EMBEDDED:
        made, rows, left_out, unread = _embedded(source), None, 0, ()
    else:
        made, rows, left_out, unread = _of_rows(source)
    distinct = protocol == "distinct"
    every, made = len(made), _of_categories(source, made, distinct) if source.categories else made
    unique, duplicates = _distinct([one.example for one in made]) if distinct else (list(range(len(made))), [])
    disagreeing = sum(_disagree(made[i].example, made[unique[at]].example) for i, at in duplicates)
    account = Account(str(source), every if rows is None else rows, left_out, len(duplicates), disagreeing,
                      unread=unread, other_category=every - len(made))
    lost = f" ({account.rows} rows, {account.duplicates} duplicates)" if duplicates else ""
    if not unique:
        what = "these categories" if source.categories else "this kind"
        raise ValueError(f"data source {source}: found no rows of {what}, expected at least one")
    if source.stop is not None and source.stop > len(unique):
        raise ValueError(
            f"data source {source}: found stop {source.stop}, expected at most {len(unique)} examples{lost}")
    if source.start is not None and source.start < -len(unique):
        raise ValueError(f"data source {source}: found start {source.start}, expected at least -{len(unique)}{lost}")
    sliced = range(len(unique))[source.start : source.stop]
    taken = _without_variants([made[i].example for i in unique], sliced) if distinct else list(sliced)
    if not taken:
        variants = f", {len(sliced)} of them variants of prompts before it" if sliced else ""
        raise ValueError(
            f"data source {source}: found an empty slice of {len(unique)} examples{lost}{variants}, expected some")
    account = account._replace(outside=len(unique) - len(sliced), variants=len(sliced) - len(taken),
                               examples=len(taken))
    return [locate(*made[unique[i]][:3], account) for i in taken]


def _of_categories(source: DataSource, made: Sequence[_Made], distinct: bool) -> list[_Made]:
    """The examples that the source's categories choose."""
    known = sorted({name for one in made for name in one.categories})
    if not known:
        raise ValueError(f"data source {source}: found no column 'category' with names and true or false, expected one "
                         "to choose by")
    if unknown := [name for name in source.categories if name not in known]:
        raise ValueError(f"data source {source}: found category {unknown[0]!r}, expected one of {'; '.join(known)}")
    chosen = [any(one.categories.get(name) for name in source.categories) for one in made]
    if not source.negated:
        return [one for one, holds in zip(made, chosen, strict=True) if holds]
    prompts = {fingerprint(one.example) for one, holds in zip(made, chosen, strict=True) if holds and distinct
               and has_prompt(one.example)}
    return [one for one, holds in zip(made, chosen, strict=True)
            if not holds and fingerprint(one.example) not in prompts]


def _embedded(source: DataSource) -> list[_Made]:
    kind = EMBEDDED[source.kind]
    return [_Made(example, f"{source.kind}@{source.split}, example {i} (from 0)", Example._fields,
                  kind.categories(example) if source.categories else {})
            for i, example in enumerate(kind.make(source.split))]


def _categories(row: Mapping[str, Any]) -> Mapping[str, bool]:
    """BeaverTails' column `category`, {name: bool}."""
    found = row.get("category")
    return found if isinstance(found, Mapping) else {}


def _of_rows(source: DataSource) -> tuple[list[_Made], int, int, tuple[str, ...]]:
    """(examples, how many rows there are, how many of them made none, columns that were not read)."""
    make = DATASETS[source.kind]
    rows = [Watched(row, i) for i, row in enumerate(read_rows(source.path, source.split))]
    examples = make(rows)
    # A kind is a function of rows to examples, in order: which row made which is seen from its answer to each.
    parts = [[e] for e in examples] if len(examples) == len(rows) else [make([row]) for row in rows]
    if [e for part in parts for e in part] != examples:
        if source.categories:
            raise ValueError(f"data source {source}: found a kind whose examples are not made row by row, expected no "
                             "categories")
        made = [_Made(e, f"{source}, example {i} (from 0)", Example._fields) for i, e in enumerate(examples)]
        return made, len(rows), max(0, len(rows) - len(made)), ()
    made, unread = [], {}
    for row, part in zip(rows, parts, strict=True):
        if part:
            categories = _categories(row) if source.categories else {}
            found = row.unread()
            unread.update(dict.fromkeys(found))
            _check_unread(source.kind, row, found, part)
            made += [_Made(example, row.where, _columns(example, row), categories) for example in part]
    return made, len(rows), sum(not part for part in parts), tuple(unread)


def _columns(example: Example, row: Watched) -> tuple[str, str, str]:
    """The columns that hold the example's texts; the text's own name, where it is not a column's as it stands."""
    names = {value.strip(): name for name, value in row.row.items() if isinstance(value, str) and name in row.read}
    found = (names.get(text.strip()) if text.strip() else None for text in example)
    # A column with a whole conversation is that of all its texts.
    whole = next((name for name in row.read if isinstance(row.row[name], list)), None)
    instruction, input, output = (
        name or whole or own for name, own in zip(found, Example._fields, strict=True))
    return instruction, input, output


def _check_unread(kind: str, row: Watched, unread: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Raises ValueError for a column that looks like a part of the prompt and holds what no prompt of the row has."""
    parts = PROMPT_PARTS | _OF_INSTRUCTIONS if kind == "instructions" else PROMPT_PARTS
    for name, value in unread.items():
        if name.strip().lower() in parts and not _is_covered(value, examples):
            raise ValueError(
                f"{row.where}: column {name!r}: found text that kind {kind!r} does not read, expected all of the "
                f"prompt in the columns that it reads (here {', '.join(name for name in row.row if name in row.read)})"
                "; delete the column, or rename it, if it is no part of the prompt")


_ROLES = frozenset(("user", "assistant", "human", "gpt", "system", "model", "bot"))
_LONG = 20  # characters that are not in a prompt by chance


def _is_covered(value: Any, examples: Sequence[Example]) -> bool:
    """Whether all texts in a column's value are in an example's, or are a formatted copy of its prompt."""
    spaced = [[" ".join(text.split()) for text in (*example, *(turn.text for turn in example.history))]
              for example in examples]

    def known(text: str) -> bool:
        text = " ".join(text.split())
        return any(text == own or (text in own and (len(text) > _LONG or not isinstance(value, str)))
                   for texts in spaced for own in texts) or any(
            texts[0] and all(own in text for own in texts[:2]) for texts in spaced)

    return all(known(text) or text.strip().lower() in _ROLES for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child)


def _distinct(examples: Sequence[Example]) -> tuple[list[int], list[tuple[int, int]]]:
    """(which examples are kept, [(a duplicate, the place in the former of what it duplicates)]).

    Those without a prompt are nobody's duplicates: they are counted as what they are.
    """
    kept, duplicates, places = [], [], {}
    for i, example in enumerate(examples):
        at = places.setdefault(same_prompt(example), len(kept)) if has_prompt(example) else len(kept)
        if at == len(kept):
            kept.append(i)
        elif is_blank(examples[kept[at]].output) and not is_blank(example.output):
            duplicates.append((kept[at], at))
            kept[at] = i
        else:
            duplicates.append((i, at))
    return kept, duplicates


def _disagree(duplicate: Example, example: Example) -> bool:
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


def load_categories(sources: str | Sequence[DataSource]) -> dict[str, tuple[str, ...]]:
    """{fingerprint of a prompt: its kinds of harm, sorted} of all prompts in the sources that have any.

    They are BeaverTails' column `category`, {name: bool}, in whichever kind of data it occurs, and the small world's
    sorts. A prompt that several rows of its kind hold has the kinds of harm of all of them. Slices and the categories
    that a source chooses make no difference.
    Formats that have no room for the column, such as CSV, have no categories.

    Raises:
      ValueError, FileNotFoundError: as of `load_examples`.
    """
    found: dict[str, set[str]] = {}
    for source in parse_sources(sources) if isinstance(sources, str) else sources:
        kind = EMBEDDED.get(source.kind)
        if source.path:
            rows, make, categories = read_rows(source.path, source.split), DATASETS[source.kind], _categories
        else:
            rows, make, categories = kind.make(source.split) if kind.categories else (), list, kind.categories
        for row in rows:
            names = {name for name, holds in categories(row).items() if holds}
            for example in make([row]) if names else ():
                found.setdefault(fingerprint(example), set()).update(names)
    return {prompt: tuple(sorted(names)) for prompt, names in found.items()}
