"""Markdown: tables, and how a number with its spread is written."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from jaxvaccine.report import names
from jaxvaccine.report.statistics import Estimate, estimate, estimate_rows

REPORT = "report.md"
NONE = "–"
# What the numbers in parentheses are, for the notes below a table.
OVER_RUNS = ("Mean ± standard deviation over {runs}; in parentheses Student's 95% interval of the mean, cut at 0 and "
             "100 where it is one of percentages.")
OVER_PROMPTS = "In parentheses, of a single run: 95% Wilson interval over the test prompts."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A cell's own bars and line breaks do not break it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in line) + " |"
                     for line in lines) + "\n"


def percent(found: Estimate | None, interval: bool = True) -> str:
    """"30.0 ± 26.5 (0–96)" of runs, "10.0 (5–15)" of a single one, "–" of none."""
    if found is None:
        return NONE
    text = f"{found.mean:.1f}" + ("" if math.isnan(found.sd) else f" ± {found.sd:.1f}")
    known = interval and not math.isnan(found.low)
    return text + (f" ({found.low:.0f}–{found.high:.0f})" if known else "")


def number(found: Estimate | None) -> str:
    """"0.94 ± 0.16": the deviation to two digits and the mean to the same place; three digits of a single run's."""
    if found is None:
        return NONE
    if math.isnan(found.sd) or found.sd == 0 or not math.isfinite(found.sd):
        return f"{found.mean:.3g}" + ("" if math.isnan(found.sd) else f" ± {found.sd:.2g}")
    places = 1 - math.floor(math.log10(found.sd))
    if not 0 <= places <= 4:
        return f"{found.mean:.3g} ± {found.sd:.2g}"
    return f"{found.mean:.{places}f} ± {found.sd:.{places}f}"


def quantity(found: Estimate | None, unit: str, interval: bool = True) -> str:
    """A percentage as `percent`, anything else as `number`."""
    return percent(found, interval) if unit == names.PERCENT else number(found)


def cell(rows: pd.DataFrame, measure: str, interval: bool = True) -> str:
    """A measure of one cell's rows at one step, a row per run."""
    rows = rows[rows["measure"] == measure]
    unit = names.measure(measure).unit
    return quantity(estimate_rows(rows, unit == names.PERCENT), unit, interval)


def rate(result: Mapping[str, Any] | None) -> str:
    """Score and interval of an evaluation's result ({score, interval}), "–" without one."""
    return NONE if result is None else percent(estimate([result["score"]], True, result["interval"]))


def spread_note(backbones: Sequence[str], seeds: Sequence[object]) -> str:
    """What the tables' numbers are over."""
    if len(backbones) * len(seeds) == 1:
        return f"One run: {backbones[0]}, seed {seeds[0]}. {OVER_PROMPTS}"
    several = [f"{word} ({', '.join(map(str, items))})" for word, items in (("backbones", backbones), ("seeds", seeds))
               if len(items) > 1]
    return OVER_RUNS.format(runs=" times ".join(several)) + " " + OVER_PROMPTS


def dialogues(said: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Every request as a quotation, and a table of who answered what. said: request -> (model, answer)."""
    return "\n".join(f"> {' '.join(request.split())}\n\n{table(['model', 'answer'], answers)}"
                     for request, answers in said.items())


def write_report(folder: str | Path, text: str) -> None:
    """The folder's report.md."""
    (Path(folder) / REPORT).write_text(text, encoding="utf-8")
