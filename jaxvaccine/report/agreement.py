"""The report of two judges on the same answers."""

from jaxvaccine.evaluation.agreement import WORDS, Agreement
from jaxvaccine.report import tables


def agreement_report(found: Agreement, first: str, second: str, disagreements: str) -> str:
    """Markdown: the table of verdicts without empty rows and columns, agreement and Cohen's kappa.

    Args:
      found: how far they agree.
      first, second: the judges' names.
      disagreements: the file with every answer on which they differ.
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
    return "\n".join([
        f"# {first} and {second} on {sum(map(sum, found.table))} answers\n",
        tables.table(["", *(f"{second}: {name}" for name in shown)], rows),
        f"{judged} Where they differ: {disagreements}.\n"])
