"""What became of the rows of every source, in the report of a run, an evaluation or a plan."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxvaccine.data import LIKENESSES
from jaxvaccine.experiment import runs
from jaxvaccine.experiment.attack import MIXED_IN
from jaxvaccine.experiment.data_card import DataCard
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.plans import AS_IT_COMES
from jaxvaccine.experiment.results import Cell
from jaxvaccine.json_files import read_json
from jaxvaccine.report import tables

# As of data.Account. A column in which all is 0 is left out.
COLUMNS = {
    "rows": "rows", "left_out": "of another kind", "other_category": "of another category", "duplicates": "duplicates",
    "disagreeing": "of them with another answer", "outside": "outside of the slice",
    "variants": "variants of prompts outside", "examples": "examples",
    "prompts": "different prompts", "repeated": "with the prompt of an earlier one",
    "empty": "empty", "dropped": "prompt too long", "cut": "answer cut", "trained": "trained on"}
ALWAYS = ("rows", "examples")
OF_ATTACK = ("user", "harmful", MIXED_IN, "alignment")  # what an attack trains on; the rest of its cell's are tests
NOTE = ("Duplicates have the prompt of an earlier row. Examples without a prompt or an answer (empty) and "
        "those whose prompt fills --max_length alone (prompt too long) are not trained on; a cut answer is trained on "
        "without its end. Of an attack's data, these are the examples that were drawn or passed over.\n")

TOKENS = "tokens: fewest / median / most"
PARTLY = ("Of a source with a slice between two numbers, rows are read until it is full: those behind it are in no "
          "count.\n")
ALIKE = ("Prompts count as shared if they are the same to the letter (exact); but for case, white space and Unicode "
         "form, the measure of leaks (normalised); but for punctuation too (unpunctuated).\n")
SHARED = ("Shared are prompts that are the same but for case, white space and Unicode form: with the sets above, and "
          "of an attack or a test with what the model was trained on before.\n")

# {name of the data: {source: what an account counts}}, as a run records it.
Record = Mapping[str, Mapping[str, Mapping[str, Any]]]


def section(*records: Record) -> str:
    """Markdown: a line per data and source; where the records differ, from the least to the most. "" without any."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        for name, sources in record.items():
            for source, counts in sources.items():
                found.setdefault((name, source), []).append(counts)
    if not found:
        return ""
    shown = [key for key in COLUMNS if key in ALWAYS or any(
        counts.get(key) for of in found.values() for counts in of)]
    unread = {key: list(dict.fromkeys(itertools.chain(*(counts.get("unread", ()) for counts in of))))
              for key, of in found.items()}
    texts = {TOKENS: {key: " / ".join(map(_range, zip(*(of_one for counts in of if (of_one := counts.get("tokens"))),
                                                       strict=True))) for key, of in found.items()},
             "bad rows": {key: _all(f"{count} {reason}" for counts in of for reason, count in counts.get(
                 "bad", {}).items()) for key, of in found.items()},
             "columns not read": {key: ", ".join(of) for key, of in unread.items()}}
    header = ["data", "source", *(COLUMNS[key] for key in shown)]
    lines = [[*key, *(_range([counts.get(name) for counts in of]) for name in shown)] for key, of in found.items()]
    for name, by_source in texts.items():
        if any(by_source.values()):
            header.append(name)
            lines = [[*line, by_source[key] or tables.NONE] for line, key in zip(lines, found, strict=True)]
    partly = PARTLY if any(counts.get("partly") for of in found.values() for counts in of) else ""
    return f"## Data\n\n{tables.table(header, lines)}\n{NOTE}{partly}"


def _all(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, texts)))


def card(found: DataCard) -> str:
    """Markdown: the accounts of sources, and how many prompts sets have in common, by how alike they are."""
    lines = [[one, other, *(str(counts[likeness]) for likeness in LIKENESSES)]
             for (one, other), counts in found.overlaps.items()]
    shared = tables.table(["prompts of", "also in", *LIKENESSES], lines) + f"\n{ALIKE}" if lines else ""
    return "\n".join(filter(None, (section(found.accounts), shared)))


def overlaps(*records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: how many prompts sets have in common, as of `data.shared_prompts`; where the records differ, from the
    least to the most. "" without any."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        for name, of in record.items():
            found.setdefault(name, []).append(of)
    if not found:
        return ""
    lines = []
    for name, of in found.items():
        others = dict.fromkeys(other for one in of for other in one["shared"])
        shared = [f"{_range([one['shared'].get(other, 0) for one in of])} with {other}" for other in others]
        lines.append([name, _range([one["prompts"] for one in of]), ", ".join(shared) or "0"])
    return f"{tables.table(['prompts of', 'different ones', 'shared'], lines)}\n{SHARED}"


def _range(values: Sequence[int | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return tables.NONE
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def of_plan(folder: str | Path) -> str:
    """The section of all cells of a plan that are there; "" of a folder with a table of results alone."""
    root = Path(folder)
    if not (root / runs.CONFIG).is_file():
        return ""
    plan = runs.read_config(root)["operational"]["plan"]
    paths = {result_path(root, Cell(backbone, AS_IT_COMES, "", 0)): "" for backbone in plan["backbones"]}
    pairs = dict.fromkeys(pair for method, attack in plan["pairs"] for pair in ((method, ""), (method, attack)))
    paths |= {result_path(root, Cell(backbone, method, attack, seed)): attack for backbone in plan["backbones"]
              for method, attack in pairs for seed in plan["seeds"]}
    found = [(read_json(path), attack) for path, attack in paths.items() if path.exists()]
    accounts, shared = ([{f"attack: {name}" if attack and name in OF_ATTACK else name: of
                          for name, of in cell.get(part, {}).items()} for cell, attack in found]
                        for part in ("accounts", "shared"))
    return "\n".join(filter(None, (section(*accounts), overlaps(*shared))))
