"""How far methods are from SFT, run by run: a section of every report that may go over several methods."""

from collections.abc import Iterable, Sequence

import pandas as pd

from jaxvaccine.experiment.plans import split_method
from jaxvaccine.report import names, results, tables
from jaxvaccine.report.statistics import paired

REFERENCE = "sft"
HEADING = "## Differences to SFT, paired\n"
NOTE = ("A method minus SFT with the same backbone, seed and attack, in points: mean ± standard deviation over such "
        "pairs. In parentheses: 95% interval of the mean difference, over the same as that of a mean (a single pair's "
        "is Newcombe's); the prompts' part takes both models' verdicts on a prompt as independent, and is too wide "
        "where they agree.\n")


def measures(table: pd.DataFrame) -> list[str]:
    """What is compared, of a table: HS or what stands for it, FA or TS, and over-refusal."""
    found = set(table["measure"])
    return [name for name in (names.harm(found), *names.ACCURACIES, names.TS, names.OVER_REFUSAL) if name in found]


def pairs_of(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (method, attack) that a table itself goes over, attack "" for the aligned models alone."""
    rows = table.loc[table["stage"] != "backbone", ["method", "attack"]].drop_duplicates()
    return list(rows.itertuples(index=False, name=None))


def difference_table(table: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> tuple[str, int]:
    """(Markdown, how many models have no SFT beside them): a line for every other method's aligned model, and for its
    end of every attack. "" where no model has one.

    pairs: (method, attack); attack "" for the aligned model alone.
    """
    compared = names.measures(measures(table))
    aligned, attacked = results.aligned(table), results.attacked(table)
    several = table.loc[table["stage"] != "backbone", "backbone"].nunique() > 1
    models = dict.fromkeys((method, of) for method, attack in pairs for of in ("", attack))
    lines, alone = [], 0
    for method, attack in models:
        # The aligned model of SFT with a defense while fine-tuning is SFT's.
        if method == REFERENCE or (not attack and split_method(method)[0] == REFERENCE and split_method(method)[1]):
            continue
        rows, reference = (results.pick(attacked, method=name, attack=attack) if attack else
                           results.pick(aligned, method=name) for name in (method, REFERENCE))
        found = [paired(results.pick(rows, measure=name), results.pick(reference, measure=name), percent=True)
                 for name in compared]
        if any(found):
            both = results.runs(rows) & results.runs(reference)
            lines.append([names.method(method), f"attacked, {names.attack(attack)}" if attack else "aligned",
                          *map(tables.difference, found), tables.run_count(both, several)])
        elif len(rows):
            alone += 1
    header = ["method", "model", *(f"{of.name}, points" for of in compared.values()),
              "pairs (backbones)" if several else "pairs"]
    return tables.table(header, lines) if lines else "", alone


def section(table: pd.DataFrame, pairs: Sequence[tuple[str, str]] | None = None) -> str:
    """Markdown: the table below a headline, or why there is none; "" of a table without scores.

    pairs: as of `difference_table`; by default all that the table has.
    """
    if not measures(table) or (table["stage"] == "backbone").all():
        return ""
    pairs = pairs_of(table) if pairs is None else pairs
    text, alone = difference_table(table, pairs)
    others = [method for method in dict.fromkeys(method for method, _ in pairs) if method != REFERENCE]
    if not (table["method"] == REFERENCE).any():
        why = "Without results of SFT there is nothing to compare with.\n"
    elif not others:
        why = "There is no other method than SFT.\n"
    elif not text:
        why = "No other model has results of SFT with the same backbone, seed and attack.\n"
    else:
        why = NOTE if not alone else (
            f"{NOTE}\n{alone} model{'s' * (alone > 1)} without results of SFT with the same backbone, seed and attack "
            f"{'are' if alone > 1 else 'is'} left out.\n")
    return "\n".join(part for part in (HEADING, text, why) if part)
