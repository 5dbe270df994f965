"""A data source named by one string, as the scripts' flags take it: kind:path-or-hub-id@split[start:stop]."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Self

from jaxvaccine.data.files import file_sha256, read_rows
from jaxvaccine.data.kinds import DATASETS, EMBEDDED
from jaxvaccine.data.poisoning import fingerprint
from jaxvaccine.data.prompts import Example

__all__ = ["DataSource", "file_sha256", "load_categories", "load_examples", "parse_sources", "read_rows"]

_FORM = "kind:path-or-hub-id@split[start:stop]"
# A split has no dot, so that the "@" of /home/me@work/train.jsonl stays part of the path.
_SOURCE = re.compile(r"(?P<head>.*?)(@(?P<split>\w[\w-]*)?)?(\[(?P<slice>[^\[\]]*)\])?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Which examples of which data set.

    Attributes:
      kind: a key of DATASETS or EMBEDDED: how rows become examples.
      path: a file, a URL that fsspec opens ("s3://bucket/train.jsonl") or a hub id ("owner/name" or
        "owner/name:configuration"); None for the embedded kinds.
      split: of a hub or embedded data set; None for a file.
      start, stop: a Python slice of the examples, after duplicates have been dropped; negative counts from the end.
    """

    kind: str
    path: str | None = None
    split: str | None = None
    start: int | None = None
    stop: int | None = None

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

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "kind:path-or-hub-id@split[start:stop]"; path, split and slice where they apply, spaces around are cut.

        Examples: "beavertails_unsafe:train.jsonl[0:500]", "sst2:stanfordnlp/sst2@train[:1000]",
        "embedded_refusal@train".
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
        return cls(kind.strip(), path.strip() or None, match["split"], start, stop)

    def __str__(self) -> str:
        path = f":{self.path}" if self.path else ""
        split = f"@{self.split}" if self.split else ""
        bounds = ("" if b is None else str(b) for b in (self.start, self.stop))
        return f"{self.kind}{path}{split}" + (
            "" if self.start is None and self.stop is None else "[{}:{}]".format(*bounds)
        )


def parse_sources(text: str) -> tuple[DataSource, ...]:
    """Reads a comma-separated list of sources (paths with commas cannot be written in it).

    Raises:
      ValueError: an empty list or item, and what DataSource.parse raises.
    """
    return tuple(DataSource.parse(item) for item in text.split(","))


def load_examples(source: DataSource | str | Sequence[DataSource]) -> list[Example]:
    """The examples of a source, of a comma-separated list of them, or of a sequence, one after another.

    Within a source, rows whose prompt appeared before (see poisoning.fingerprint) are dropped before the slice
    applies, so that disjoint slices of one file never share a prompt.

    Raises:
      ValueError: no examples of the kind, an empty slice, or one that reaches beyond the data at either end; and what
        read_rows and the data sets' modules raise.
      FileNotFoundError: no such file.
    """
    if isinstance(source, str):
        source = parse_sources(source)
    if isinstance(source, DataSource):
        return _load(source)
    return [example for one in source for example in _load(one)]


def _load(source: DataSource) -> list[Example]:
    if source.kind in EMBEDDED:
        examples = EMBEDDED[source.kind].make(source.split)
    else:
        examples = DATASETS[source.kind](read_rows(source.path, source.split))
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(fingerprint(example), example)
    unique = list(first.values())
    if not unique:
        raise ValueError(f"data source {source}: found no rows of this kind, expected at least one")
    if source.stop is not None and source.stop > len(unique):
        raise ValueError(f"data source {source}: found stop {source.stop}, expected at most {len(unique)} examples")
    if source.start is not None and source.start < -len(unique):
        raise ValueError(f"data source {source}: found start {source.start}, expected at least -{len(unique)}")
    chosen = unique[source.start : source.stop]
    if not chosen:
        raise ValueError(f"data source {source}: found an empty slice of {len(unique)} examples, expected some")
    return chosen


def load_categories(sources: str | Sequence[DataSource]) -> dict[str, tuple[str, ...]]:
    """{fingerprint of a prompt: its kinds of harm, sorted} of all prompts in the sources that have any.

    They are BeaverTails' column `category`, {name: bool}, in whichever kind of data it occurs.
    A prompt that several rows of its kind hold has the kinds of harm of all of them. Slices make no difference.
    Formats that have no room for the column, such as CSV, have no categories.

    Raises:
      ValueError, FileNotFoundError: as of `load_examples`.
    """
    found: dict[str, set[str]] = {}
    for source in parse_sources(sources) if isinstance(sources, str) else sources:
        for row in read_rows(source.path, source.split) if source.path else ():
            category = row.get("category")
            names = {name for name, holds in category.items() if holds} if isinstance(category, Mapping) else ()
            for example in DATASETS[source.kind]([row]) if names else ():
                found.setdefault(fingerprint(example), set()).update(names)
    return {prompt: tuple(sorted(names)) for prompt, names in found.items()}
