"""Figures that the papers state, each with its source. What is not here is left blank in comparisons."""

from typing import NamedTuple


class Figure(NamedTuple):
    """HS and FA in percent of one cell of a paper's table."""

    method: str
    poison_ratio: str
    n: int
    harmful_score: float
    accuracy: float
    model: str
    task: str  # the user's
    source: str


TABLES: dict[str, tuple[Figure, ...]] = {
    "booster": (),
    "t_vaccine": (Figure("t_vaccine", "0.1", 1000, 14.97, 92.40, "Llama-2-7B", "sst2", "arXiv 2410.09760, table 1"),),
}

# Statements without a cell of their own: what, the published number, source.
CLAIMS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "booster": (("largest drop of HS by Booster", "34.14%", "arXiv 2409.01586"),),
    "t_vaccine": (("memory of T-Vaccine against Vaccine", "−31.53%", "arXiv 2410.09760"),),
}
