"""What became of a source's rows on the way from the file to the batches, counted: nothing is lost without a word."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxvaccine.data.prompts import Example, Turn, with_history

# Of an example that is tokenized: "empty" has no prompt or no answer, "dropped" has a prompt that fills max_length
# alone, "cut" has lost the end of its answer to max_length. Those that are "kept" or "cut" are trained on.
Fate = Literal["kept", "cut", "dropped", "empty"]


class Account(NamedTuple):
    """One source's rows. `rows` is the sum of left_out, other_category, duplicates, outside, variants, examples and
    of what is bad.

    Attributes:
      source: as `DataSource` writes it.
      rows: read.
      left_out: rows that the kind does not take, such as the safe ones of beavertails_unsafe.
      other_category: examples whose categories the source does not take.
      duplicates: rows whose prompt appeared before, which are left out; 0 where rows are taken as they are.
      disagreeing: how many of the duplicates have another answer than the row that is kept; where rows are taken as
        they are, how many of the slice's examples have another than the first one of their prompt.
      outside: examples outside of the slice.
      variants: examples that the slice left out because a row outside of it, and before, has the same prompt but for
        case or Unicode form (`poisoning.fingerprint`): disjoint slices share none.
      examples: handed on.
      repeated: how many of them have a prompt that an earlier source of the same list has too; where rows are taken as
        they are, also that an earlier row of the slice has.
      unread: columns with something in them that nobody read.
      empty: examples without a prompt or an answer, which are not trained on.
      dropped: examples whose prompt alone fills max_length, which are not trained on either.
      cut: examples whose answer lost its end to max_length; they are trained on.
      bad: (what is wrong, how many) of the rows that could not be read and were left out.
      partly: whether the slice was full before the rows ended; those behind it were not read.
      prompts: how many different prompts the examples have.
      tokens: of the examples with a prompt and an answer, prompt, answer and EOS, before max_length cuts them: the
        fewest, the median and the most. () of what was not tokenized.
      trained: examples in the batches; None where nothing is trained. Of an attack, those that were drawn.
    """

    source: str
    rows: int
    left_out: int = 0
    duplicates: int = 0
    disagreeing: int = 0
    outside: int = 0
    variants: int = 0
    examples: int = 0
    repeated: int = 0
    unread: tuple[str, ...] = ()
    empty: int = 0
    dropped: int = 0
    cut: int = 0
    trained: int | None = None
    other_category: int = 0
    bad: tuple[tuple[str, int], ...] = ()
    partly: bool = False
    prompts: int = 0
    tokens: tuple[int, ...] = ()


class Located(Example):
    """An example that knows its place ("train.jsonl, line 7"), the columns of its three texts, and its source's
    account; otherwise a plain Example."""

    where: str
    columns: tuple[str, str, str]
    account: Account
    turns: tuple[Turn, ...] = ()

    @property
    def history(self) -> tuple[Turn, ...]:
        return self.turns

    def _replace(self, **given: Any) -> "Located":
        return self.like(with_history(Example(*super()._replace(**given)), self.turns))

    def like(self, example: Example) -> "Located":
        """Another example at this one's place."""
        return locate(example, self.where, self.columns, self.account)


def locate(example: Example, where: str, columns: tuple[str, str, str], account: Account) -> Located:
    """The example with its place."""
    located = Located(*example)
    located.where, located.columns, located.account, located.turns = where, columns, account, example.history
    return located


def place(example: Example, index: int, field: int | None = None) -> str:
    """Where an example came from, for errors; with one of its texts, which column holds it (0, 1, 2), or which turn of
    its history it is (-1 the last one)."""
    where = getattr(example, "where", f"row {index} (from 0)")
    if field is None:
        return where
    if field < 0:
        turn = len(example.history) + field
        return f"{where}: turn {turn} (from 0), the {example.history[turn].role}'s"
    return f"{where}: column {getattr(example, 'columns', Example._fields)[field]!r}"


def accounts_of(examples: Iterable[Example]) -> tuple[Account, ...]:
    """The accounts of the examples' sources, each once, in order."""
    return tuple(dict.fromkeys(e.account for e in examples if isinstance(e, Located)))


def tally(accounts: Iterable[Account], examples: Sequence[Example], fates: Sequence[Fate],
          lengths: Sequence[int] = ()) -> tuple[Account, ...]:
    """The accounts, with what became of their examples when they were tokenized.

    lengths: of every example in tokens, as of `tokenizing.TokenizedExamples`.
    """
    counts = Counter((getattr(e, "account", None), fate) for e, fate in zip(examples, fates, strict=True))
    accounts = tuple(accounts)
    return tuple(told._replace(**{fate: counts[account, fate] for fate in ("empty", "dropped", "cut")},
                               trained=counts[account, "kept"] + counts[account, "cut"])
                 for account, told in zip(accounts, with_tokens(accounts, examples, lengths), strict=True))


def with_tokens(accounts: Iterable[Account], examples: Sequence[Example], lengths: Sequence[int]
                ) -> tuple[Account, ...]:
    """The accounts, with the lengths of those examples that are of their sources; lengths as of `tally`."""
    found: dict[str, list[int]] = {}
    for example, length in zip(examples, lengths, strict=False):
        if length and isinstance(example, Located):
            found.setdefault(example.account.source, []).append(length)
    return tuple(account._replace(tokens=(min(of), round(statistics.median(of)), max(of)))
                 if (of := found.get(account.source)) else account for account in accounts)


def record(accounts: Mapping[str, Iterable[Account]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{name of the data: {source: what the account counts}}, JSON values."""
    return {name: {account.source: {key: dict(value) if key == "bad" else list(value) if isinstance(value, tuple)
                                    else value for key, value in account._asdict().items() if key != "source"}
                   for account in of} for name, of in accounts.items()}


def describe_bad(account: Account) -> str:
    """"2 malformed JSON, 1 missing column 'prompt'": what is wrong with the rows that were left out as bad."""
    return ", ".join(f"{count} {reason}" for reason, count in account.bad)


def losses(account: Account) -> str:
    """"3 duplicates (2 with another answer), 1 empty": what is not in `examples` but for the slice, or not whole."""
    other = f" ({account.disagreeing} with another answer)" if account.disagreeing else ""
    parts = {
        "of another kind": account.left_out, "of another category": account.other_category,
        f"duplicates{other}": account.duplicates,
        "outside of the slice but for case or Unicode form": account.variants,
        "with the prompt of an earlier one": account.repeated, "empty": account.empty,
        "with a prompt that fills max_length": account.dropped, "with an answer cut at max_length": account.cut}
    found = [f"{count} {what}" for what, count in parts.items() if count]
    if account.bad:
        found.insert(0, f"{sum(count for _, count in account.bad)} bad rows ({describe_bad(account)})")
    return ", ".join([*found, *([f"unread columns {', '.join(account.unread)}"] if account.unread else [])])


def describe(account: Account) -> str:
    """One line: "train.jsonl: 9 rows, 3 examples, 2 trained on; 5 duplicates, …"."""
    trained = "" if account.trained is None else f", {account.trained} trained on"
    lost = losses(account)
    counts = f"{account.source}: {account.rows} rows, {account.examples} examples{trained}"
    return f"{counts}; {lost}" if lost else counts


def origin(examples: Iterable[Example]) -> str:
    """" (3 rows: 2 duplicates)": why there are no more of them, for errors; "" if they are all of their rows."""
    accounts = accounts_of(examples)
    parts = [f"{sum(a.rows for a in accounts)} rows", *(
        f"{total} {name}" for name in ("left_out", "other_category", "duplicates", "outside", "variants")
        if (total := sum(getattr(a, name) for a in accounts)))]
    return f" ({parts[0]}: {', '.join(parts[1:]).replace('_', ' ')})" if len(parts) > 1 else ""
