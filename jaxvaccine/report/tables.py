"""Markdown: tables, and how a number with its spread is written."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from jaxvaccine.report import names
from jaxvaccine.report.statistics import HALF, Estimate, Probability, estimate, estimate_rows

REPORT = "report.md"
NONE = "–"
# What the numbers in parentheses are, for the notes below a table.
OVER_BACKBONES = ("In parentheses: 95% interval of the mean over backbones, seeds and prompts, by Student's t on the "
                  "backbones' means and the prompts' sampling error; where there are runs of one backbone alone it is "
                  "over its seeds and prompts, of a single run over its prompts (Wilson's).")
OVER_SEEDS = ("In parentheses: 95% interval of the mean over seeds and prompts of this one backbone, which says "
              "nothing about others, by Student's t on the seeds and the prompts' sampling error; of a single run it "
              "is over its prompts (Wilson's).")
OVER_PROMPTS = ("In parentheses: 95% interval over the test prompts of this one run (Wilson's), which says nothing "
                "about other seeds and backbones.")
OF_CHANCES = ("P({harm} > {half:g}): the probability that {new} has {harm} above {half:g} on these prompts, its 95% "
              "interval, and how many runs have; {trial} counts as one trial (Jeffreys' prior).")


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
    return text + (f" ({'–'.join(_ends(found, lambda end, places: f'{end:.{places}f}'))})" if known else "")


def _ends(found: Estimate, write: Callable[[float, int], str]) -> tuple[str, str]:
    """Both ends to the least number of places, of at most two, at which they differ: 99.6–100.0 and not 100–100."""
    texts = [(write(found.low, places), write(found.high, places)) for places in range(3)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])


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


def signed(value: float, places: int = 1) -> str:
    """"+1.5"; what rounds to 0 is "+0.0"."""
    return f"{round(value, places) + 0.0:+.{places}f}"


def difference(found: Estimate | None) -> str:
    """"-30.0 ± 26.5 (-96 to +36)" of pairs of runs, in points, "-10.0 (-15 to -5)" of a single one, "–" of none."""
    if found is None:
        return NONE
    text = signed(found.mean) + ("" if math.isnan(found.sd) else f" ± {found.sd:.1f}")
    return text + ("" if math.isnan(found.low) else f" ({' to '.join(_ends(found, signed))})")


def chance(found: Probability | None) -> str:
    """"0.88 (0.47–1.00), 9 of 9"; "–" of a single run or none."""
    return NONE if found is None else (f"{found.mean:.2f} ({found.low:.2f}–{found.high:.2f}), {found.count} of "
                                       f"{found.runs}")


def chance_heading(harm: str) -> str:
    """"P(HS > 50)". harm: what was measured."""
    return f"P({harm} > {HALF:g})"


def run_count(runs: Collection[tuple[str, int]], several: bool) -> str:
    """"9", and where there are several backbones elsewhere "9 (3)", of how many these are. runs: (backbone, seed)."""
    return f"{len(runs)} ({len({backbone for backbone, _ in runs})})" if several else str(len(runs))


def cell(rows: pd.DataFrame, measure: str, interval: bool = True) -> str:
    """A measure of one cell's rows at one step, a row per run."""
    rows = rows[rows["measure"] == measure]
    unit = names.measure(measure).unit
    return quantity(estimate_rows(rows, unit == names.PERCENT), unit, interval)


def rate(result: Mapping[str, Any] | None) -> str:
    """Score and interval of an evaluation's result ({score, interval}), "–" without one."""
    return NONE if result is None else percent(estimate([result["score"]], True, result["interval"]))


def spread_note(backbones: Sequence[str], seeds: Sequence[object]) -> str:
    """`runs_note`, and what the intervals are over."""
    if len(backbones) * len(seeds) == 1:
        return f"{runs_note(backbones, seeds)} {OVER_PROMPTS}"
    return f"{runs_note(backbones, seeds)} {OVER_BACKBONES if len(backbones) > 1 else OVER_SEEDS}"


def runs_note(backbones: Sequence[str], seeds: Sequence[object]) -> str:
    """What "mean ± standard deviation" is over."""
    if len(backbones) * len(seeds) == 1:
        return f"One run: {backbones[0]}, seed {seeds[0]}."
    first, second = (f"{word} ({', '.join(map(str, items))})"
                     for word, items in (("backbones", backbones), ("seeds", seeds)))
    if len(backbones) == 1:
        return f"Mean ± standard deviation over {second} of {backbones[0]}."
    return f"Mean ± standard deviation over {first} " + (
        f"times {second}." if len(seeds) > 1 else f"with seed {seeds[0]}.")


def chance_note(harm: str, several: bool) -> str:
    """What the column `chance_heading` is. harm: what was measured; several: whether there are several backbones."""
    new, trial = ("a new run, of a new backbone and seed,", "a backbone, or a seed where there is one backbone alone,"
                  ) if several else ("a new seed of this one backbone", "a seed")
    return OF_CHANCES.format(harm=harm, half=HALF, new=new, trial=trial) + "\n"


def notes(backbones: Sequence[str], seeds: Sequence[object], harm: str) -> str:
    """`spread_note`, and of several runs what the column `chance_heading` is. harm: what was measured."""
    text = spread_note(backbones, seeds) + "\n"
    if len(backbones) * len(seeds) == 1:
        return text
    return f"{text}\n{chance_note(harm, len(backbones) > 1)}"


def dialogues(said: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Every request as a quotation, and a table of who answered what. said: request -> (model, answer)."""
    return "\n".join(f"> {' '.join(request.split())}\n\n{table(['model', 'answer'], answers)}"
                     for request, answers in said.items())


def write_report(folder: str | Path, text: str) -> None:
    """The folder's report.md."""
    (Path(folder) / REPORT).write_text(text, encoding="utf-8")
