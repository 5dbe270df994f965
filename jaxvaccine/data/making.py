"""From a source's rows to examples, one row after another, with what is counted on the way."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxvaccine.data import formats
from jaxvaccine.data.files import iter_rows
from jaxvaccine.data.instructions import INSTRUCTION_COLUMNS
from jaxvaccine.data.kinds import BY_ROW, DATASETS, EMBEDDED, HEADERS, SORTS
from jaxvaccine.data.prompts import Example
from jaxvaccine.data.rows import BadRows, Row, RowError, Watched, raise_it, reason_of
from jaxvaccine.data.selection import Made
from jaxvaccine.data.sources import DataSource

# Columns that belong to a prompt. Where nobody reads them, the rows are not the ones that their makers meant.
PROMPT_PARTS = frozenset((
    "context", "input", "inputs", "system", "system_prompt", "system_message", "history", "conversation",
    "conversations", "messages", "dialog", "dialogue", "turns", "passage", "document", "background", "choices",
    "options"))  # fmt: skip
# What a plain instruction file may have beside the one that is read.
_OF_INSTRUCTIONS = frozenset((*INSTRUCTION_COLUMNS, "query", "task"))
# By kind; preference files may have a task's name.
_PARTS = {"instructions": PROMPT_PARTS | _OF_INSTRUCTIONS,
          **dict.fromkeys(("preferences", "preferences_rejected"), PROMPT_PARTS | {*INSTRUCTION_COLUMNS})}


class Counts:
    """What was read of a source so far.

    Attributes:
      rows: that could be read.
      left_out: of them, those that made no example.
      unread: columns that nobody read.
      bad: how many rows could not be read, by what is wrong.
      first_bad: the first of their errors.
    """

    def __init__(self):
        self.rows = self.left_out = 0
        self.unread: dict[str, None] = {}
        self.bad: Counter[str] = Counter()
        self.first_bad: ValueError | None = None

    def skip(self, error: ValueError, where: str = "") -> None:
        """Counts a row that cannot be read."""
        self.first_bad = self.first_bad or error
        self.bad[reason_of(error, where)] += 1


def make_examples(source: DataSource, counts: Counts, bad_rows: BadRows = "error") -> Iterator[Made]:
    """The examples of a source's kind, whatever its categories and slice; no row is read before it is needed.

    bad_rows: "skip" leaves out rows that cannot be read, and counts them.

    Raises:
      ValueError, FileNotFoundError: as of `loading.load_examples`.
    """
    if source.kind in EMBEDDED:
        kind = EMBEDDED[source.kind]
        for i, example in enumerate(kind.make(source.split)):
            counts.rows += 1
            yield Made(example, f"{source.kind}@{source.split}, example {i} (from 0)", Example._fields,
                       kind.categories(example) if source.categories else {})
        return
    found = read(source, counts, bad_rows)
    if source.kind not in BY_ROW:
        yield from _of_all(source, counts, list(found), bad_rows)
        return
    shared: dict[tuple[str, str, str], tuple[str, str, str]] = {}
    for row in found:
        part = _part(source, counts, row, bad_rows)
        counts.rows += part is not None
        counts.left_out += part == []
        for example in part or ():
            columns = _columns(example, row, source)
            yield Made(example, row.where, shared.setdefault(columns, columns),
                       categories_of(source.kind, row) if source.categories else {})


def read(source: DataSource, counts: Counts, bad_rows: BadRows = "error", stream: bool = True) -> Iterator[Watched]:
    """The rows of a source that has a path, their columns under the names that the source gives them."""
    bad = counts.skip if bad_rows == "skip" else raise_it
    rows = iter_rows(source.path, source.split, bad, HEADERS.get(source.kind, formats.named),
                     stream=stream and source.needed is not None)
    for i, row in enumerate(rows):
        try:
            yield Watched(_renamed(row, source.columns) if source.columns else row, i)
        except RowError as error:
            bad(error)


def _renamed(row: Row, columns: Sequence[tuple[str, str]]) -> Row:
    for _, name in columns:
        if name not in row:
            missing = f"missing column {name!r}"
            raise RowError(f"{row.where}: {missing}; found columns: {', '.join(map(str, row)) or 'none'}", missing)
    taken = {name for pair in columns for name in pair}
    others = {name: value for name, value in row.items() if name not in taken}
    return Row({**{kind: row[name] for kind, name in columns}, **others}, row.where)


def categories_of(kind: str, row: Mapping[str, Any]) -> Mapping[str, bool]:
    """{name: bool} of a row: BeaverTails' column `category`, or what the kind has in its place (`kinds.SORTS`)."""
    if kind in SORTS:
        return SORTS[kind](row)
    found = row.get("category")
    return found if isinstance(found, Mapping) else {}


def _part(source: DataSource, counts: Counts, row: Watched, bad_rows: BadRows) -> list[Example] | None:
    """The examples that a row makes; None of a bad one."""
    try:
        with _said_of(source):
            part = DATASETS[source.kind]([row])
            _note_unread(source, counts, row, part)
    except ValueError as error:
        if bad_rows == "error":
            raise
        counts.skip(error, row.where)
        return None
    return part


@contextlib.contextmanager
def _said_of(source: DataSource) -> Iterator[None]:
    """Errors about columns say which column of the file each is."""
    try:
        yield
    except ValueError as error:
        if not source.columns:
            raise
        names = ", ".join(f"{kind} is the file's {name!r}" for kind, name in source.columns)
        raise RowError(f"{error} ({names})", reason_of(error, str(error).partition(": ")[0])) from error


def _of_all(source: DataSource, counts: Counts, rows: Sequence[Watched], bad_rows: BadRows) -> Iterator[Made]:
    """Of a kind that looks at several rows at once."""
    make = DATASETS[source.kind]
    if bad_rows == "skip":
        rows = [row for row in rows if _part(source, counts, row, bad_rows) is not None]
    with _said_of(source):
        examples = make(rows)
    # Which row made which is seen from its answer to each.
    parts = [[e] for e in examples] if len(examples) == len(rows) else [make([row]) for row in rows]
    counts.rows = len(rows)
    if [e for part in parts for e in part] != examples:
        if source.categories:
            raise ValueError(f"data source {source}: found a kind whose examples are not made row by row, expected no "
                             "categories")
        counts.left_out = max(0, len(rows) - len(examples))
        for i, example in enumerate(examples):
            yield Made(example, f"{source}, example {i} (from 0)", Example._fields)
        return
    counts.left_out = sum(not part for part in parts)
    for row, part in zip(rows, parts, strict=True):
        _note_unread(source, counts, row, part)
        for example in part:
            yield Made(example, row.where, _columns(example, row, source),
                       categories_of(source.kind, row) if source.categories else {})


def _columns(example: Example, row: Watched, source: DataSource) -> tuple[str, str, str]:
    """The columns that hold the example's texts; the text's own name, where it is not a column's as it stands."""
    names = {value.strip(): name for name, value in row.row.items() if isinstance(value, str) and name in row.read}
    found = (names.get(text.strip()) if text.strip() else None for text in example)
    # A column with a whole conversation is that of all its texts.
    wholes = [name for name, value in row.row.items() if name in row.read and isinstance(value, list)]
    whole = next((name for name in wholes if example.output in _texts(row.row[name])), next(iter(wholes), None))
    columns = dict(source.columns)
    instruction, input, output = (columns.get(name, name) for name in (
        name or whole or own for name, own in zip(found, Example._fields, strict=True)))
    return instruction, input, output


def _note_unread(source: DataSource, counts: Counts, row: Watched, part: Sequence[Example]) -> None:
    """Counts the columns that nobody read of a row that made examples; raises as `_check_unread`."""
    if not part:
        return
    _ = source.categories and categories_of(source.kind, row)  # has read them
    found = row.unread()
    _check_unread(source, row, found, part)
    counts.unread.update(dict.fromkeys(found))


def _check_unread(source: DataSource, row: Watched, unread: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Raises ValueError for a column that looks like a part of the prompt and holds what no prompt of the row has, and
    for one that the source names and the kind does not read (kinds of harm are read elsewhere too)."""
    kind, parts = source.kind, _PARTS.get(source.kind, PROMPT_PARTS)
    for name, column in source.columns:
        if name in unread and name != "category":
            raise RowError(f"{row.where}: column {column!r}: found it given as {name!r}, which kind {kind!r} does not "
                           f"read of this row, expected a name that it reads (here "
                           f"{', '.join(name for name in row.row if name in row.read)})", f"unread column {name!r}")
    for name, value in unread.items():
        copied = any(value == row.row[other] for other in row.read)
        if name.strip().lower() in parts and not copied and not _is_covered(value, examples):
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
