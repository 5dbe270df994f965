"""A data source named by one string, as the scripts' flags take it:
kind:path-or-hub-id@split{columns name=column;name=column}{category=name;name}[start:stop]."""

import dataclasses
import re
from typing import Literal, Self

from jaxvaccine.data.kinds import DATASETS, EMBEDDED

# Every prompt once, or rows as they are, as the papers' programs take them.
Protocol = Literal["distinct", "rows"]
_FORM = "kind:path-or-hub-id@split[start:stop]"
_BRACES = "{category=name;name}, {not category=name;name} or {columns name=column;name=column}"
# A split has no dot, so that the "@" of /home/me@work/train.jsonl stays part of the path.
_SOURCE = re.compile(r"(?P<head>.*?)(@(?P<split>\w[\w-]*)?)?(?P<braces>(\s*\{[^{}]*\})*)\s*(\[(?P<slice>[^\[\]]*)\])?",
                     re.DOTALL)
_COLUMNS = re.compile(r"\s*columns\s(?P<pairs>.*)", re.DOTALL)
_FILTER = re.compile(r"\s*(?P<negated>not\s+)?category\s*=(?P<names>.*)", re.DOTALL)
# Names of categories have commas of their own.
_COMMA = re.compile(r",(?![^{}]*\})")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Which examples of which data set.

    Attributes:
      kind: a key of DATASETS or EMBEDDED: how rows become examples.
      path: a file, a URL that fsspec opens ("s3://bucket/train.jsonl") or a hub id ("owner/name" or
        "owner/name:configuration"); None for the embedded kinds.
      split: of a hub or embedded data set; None for a file.
      start, stop: a Python slice of the examples, after duplicates have been dropped unless rows are taken as they are;
        negative counts from the end.
      categories: names of kinds of harm; rows of any of them are taken, before duplicates are dropped. Of none, all.
      negated: rows of none of them are taken instead.
      columns: (name, column) pairs: what the kind reads under the name is the file's column.
    """

    kind: str
    path: str | None = None
    split: str | None = None
    start: int | None = None
    stop: int | None = None
    categories: tuple[str, ...] = ()
    negated: bool = False
    columns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        kinds = sorted({*DATASETS, *EMBEDDED})
        if self.kind not in kinds:
            raise ValueError(f"data source {self}: found kind {self.kind!r}, expected one of {', '.join(kinds)}")
        if self.kind in EMBEDDED:
            if self.path is not None:
                raise ValueError(f"data source {self}: found path {self.path!r}, expected none for an embedded kind")
            splits = EMBEDDED[self.kind].splits
            if self.split not in splits:
                raise ValueError(f"data source {self}: found split {self.split!r}, expected one of {', '.join(splits)}")
        elif not self.path:
            raise ValueError(f"data source {self}: found no path, expected {_FORM}")
        parts = [part for pair in self.columns for part in pair]
        if any(not part or part != part.strip() or set(part) & set("{};=\n") for part in parts) or any(
                len({pair[i] for pair in self.columns}) < len(self.columns) for i in (0, 1)):
            raise ValueError(f"data source {self}: found columns {self.columns!r}, expected name=column, one or more, "
                             "separated by ;, each name and each column once")
        if self.columns and self.kind in EMBEDDED:
            raise ValueError(f"data source {self}: found columns, expected none: an embedded kind reads no file")
        wrong = [name for name in self.categories if not name or name != name.strip() or set(name) & set("{};\n")]
        if wrong or len(set(self.categories)) < len(self.categories) or (self.negated and not self.categories):
            raise ValueError(f"data source {self}: found categories {self.categories!r}, expected different names, one "
                             "or more, separated by ;")
        if self.categories and self.kind in EMBEDDED and EMBEDDED[self.kind].categories is None:
            raise ValueError(f"data source {self}: found categories, expected none: kind {self.kind!r} has none")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "kind:path-or-hub-id@split{columns name=column}{category=name;name}[start:stop]"; path, split, columns,
        categories and slice where they apply, spaces around are cut.

        Examples: "beavertails_unsafe:train.jsonl[0:500]", "sst2:stanfordnlp/sst2@train[:1000]",
        "embedded_refusal@train", "beavertails_unsafe:train.jsonl{not category=self_harm;privacy_violation}[0:500]".
        """
        match = _SOURCE.fullmatch(text.strip())
        kind, _, path = match["head"].partition(":")
        start = stop = None
        if match["slice"] is not None:
            bounds = re.fullmatch(r"\s*(-?[0-9]+)?\s*:\s*(-?[0-9]+)?\s*", match["slice"])
            if not bounds:
                raise ValueError(
                    f"data source {text!r}: found slice [{match['slice']}], expected [start:stop] with whole numbers"
                )
            start, stop = (None if b is None else int(b) for b in bounds.groups())
        if not kind.strip():
            raise ValueError(f"data source {text!r}: found no kind, expected {_FORM}")
        names, negated, columns = (), False, ()
        braces = re.findall(r"\{([^{}]*)\}", match["braces"])
        if braces and match["head"].rstrip().endswith("]"):
            raise ValueError(f"data source {text!r}: found a slice before the categories or columns, expected "
                             f"{_BRACES}, then a slice")
        for inner in braces:
            chosen, renamed = _FILTER.fullmatch(inner), _COLUMNS.fullmatch(inner)
            if renamed and not columns:
                columns = tuple(_pair(text, item) for item in renamed["pairs"].split(";"))
            elif chosen and not names:
                names = tuple(name.strip() for name in chosen["names"].split(";"))
                negated = bool(chosen["negated"])
            else:
                raise ValueError(f"data source {text!r}: found {{{inner}}}, expected {_BRACES}, each once")
        return cls(kind.strip(), path.strip() or None, match["split"], start, stop, names, negated, columns)

    @property
    def needed(self) -> int | None:
        """How many examples the slice needs; None if that depends on how many there are."""
        bounded = self.stop is not None and self.stop >= 0 and (self.start or 0) >= 0
        return self.stop if bounded else None

    def __str__(self) -> str:
        path = f":{self.path}" if self.path else ""
        split = f"@{self.split}" if self.split else ""
        chosen = f"{{{'not ' * self.negated}category={';'.join(self.categories)}}}" if self.categories else ""
        pairs = ";".join(f"{name}={column}" for name, column in self.columns)
        renamed = f"{{columns {pairs}}}" if pairs else ""
        bounds = ("" if b is None else str(b) for b in (self.start, self.stop))
        return f"{self.kind}{path}{split}{renamed}{chosen}" + (
            "" if self.start is None and self.stop is None else "[{}:{}]".format(*bounds)
        )


def _pair(text: str, item: str) -> tuple[str, str]:
    name, _, column = item.partition("=")
    if not name.strip() or not column.strip():
        raise ValueError(f"data source {text!r}: found column {item!r}, expected name=column")
    return name.strip(), column.strip()


def split_sources(text: str) -> list[str]:
    """The items of a comma-separated list of sources; commas of categories' names separate none."""
    return _COMMA.split(text)


def parse_sources(text: str) -> tuple[DataSource, ...]:
    """Reads a comma-separated list of sources (paths with commas cannot be written in it).

    Raises:
      ValueError: an empty list or item, and what DataSource.parse raises.
    """
    return tuple(DataSource.parse(item) for item in split_sources(text))
