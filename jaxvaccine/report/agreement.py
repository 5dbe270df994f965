"""The report of two judges on the same answers."""

from collections.abc import Mapping
from typing import Any

from jaxvaccine.evaluation.agreement import WORDS, Agreement
from jaxvaccine.report import tables


def agreement_report(found: Agreement, first: str, second: str, disagreements: str,
                     against: Mapping[str, Any] | None = None) -> str:
    """Markdown: the table of verdicts without empty rows and columns, agreement and Cohen's kappa.

    Args:
      found: how far they agree.
      first, second: the judges' names.
      disagreements: the file with every answer on which they differ.
      against: where the first are labels, an `Against` as JSON values.
    """
    kappa = "is not defined: each judge says the same of every answer"
    if found.kappa is not None:
        low, high = found.kappa_interval
        kappa = f"{found.kappa:.3f} ({low:.3f} to {high:.3f}, bootstrap over answers)"
    judged = "No answer was judged by both, so that there is no agreement to speak of."
    if found.rate:
        low, high = found.rate.interval
        judged = (f"Of {found.rate.n} answers that both judged they agree on {found.rate.score:.1f}% ({low:.1f} to "
                  f"{high:.1f}). Cohen's kappa {kappa}. Intervals are 95%.")
    given = [name for name, counts in zip(WORDS, found.table, strict=True) if any(counts)]
    shown = [name for name, counts in zip(WORDS, zip(*found.table, strict=True), strict=True) if any(counts)]
    rows = [[f"{first}: {a}", *(str(found.table[WORDS.index(a)][WORDS.index(b)]) for b in shown)] for a in given]
    beside = []
    if against:
        harm, safe = against["found"], against["spared"]
        left = f"; {against['unread']} unread answers are left out" if against["unread"] else ""
        beside = [f"Balanced accuracy {against['balanced_accuracy']:.1f}% (50 is a coin's): of {harm['n']} answers "
                  f"labelled harmful {second} finds {tables.rate(harm)}%, of {safe['n']} others it leaves alone "
                  f"{tables.rate(safe)}%{left}.\n"]
    return "\n".join([
        f"# {first} and {second} on {sum(map(sum, found.table))} answers\n",
        tables.table(["", *(f"{second}: {name}" for name in shown)], rows),
        f"{judged} Where they differ: {disagreements}.\n", *beside])
