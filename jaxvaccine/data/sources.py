"""A data source named by one string, as the scripts' flags take it: kind:path-or-hub-id@split[start:stop]."""

import dataclasses
import re
from typing import Literal, Self

from jaxvaccine.data.kinds import DATASETS, EMBEDDED

# Every prompt once, or rows as they are, as the papers' programs take them.
Protocol = Literal["distinct", "rows"]
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
      start, stop: a Python slice of the examples, after duplicates have been dropped unless rows are taken as they are;
        negative counts from the end.
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
