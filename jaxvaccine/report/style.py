"""Which colour and marker a method has, in every figure the same.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color), with three more that stay apart from them for the colour-blind;
the marker says the same again.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from jaxvaccine.experiment.plans import split_method
from jaxvaccine.report import names

INK = "#444444"  # axes, text beside data
PALE = "#DDDDDD"  # grid


class Style(NamedTuple):
    """How a method is drawn. A variant has its method's colour, a marker of its own, not filled, and a broken line."""

    color: str
    marker: str
    filled: bool = True
    line: str | tuple = "-"

    @property
    def face(self) -> str:
        return self.color if self.filled else "white"


METHODS = {
    "sft": Style("#000000", "o"), "vaccine": Style("#0072B2", "s"), "t_vaccine": Style("#56B4E9", "D"),
    "booster": Style("#D55E00", "^"), "repnoise": Style("#009E73", "v"), "tar": Style("#CC79A7", "P"),
    "lisa": Style("#E69F00", "X"), "ewc": Style("#882255", "p"), "kl": Style("#7722CC", "h"),
    "none": Style("#777777", "*"),
}
# For methods that are not in the table, in the order in which a report names them.
_SPARE = (("#332288", "<"), ("#999933", ">"), ("#117733", "d"), ("#AA4499", "8"), ("#661100", "H"))
_VARIANT_MARKERS = ("D", "s", "o", "^", "v", "P", "X", "p", "h", "<", ">", "d")
_VARIANT_LINES = ((0, (4, 1.5)), (0, (1.2, 1.2)), (0, (4, 1.2, 1.2, 1.2)), (0, (7, 2)), (0, (2.5, 1)))


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """The style of every method, as the command line spells it.

    A plain method of METHODS has the same in every report. Its variants ("booster:lam=0.4") are told apart by marker
    and line, in the order given: a report that asks once, for all of its methods, has the same in all of its figures.
    """
    found: dict[str, Style] = {}
    spare, markers, lines = map(itertools.cycle, (_SPARE, _VARIANT_MARKERS, _VARIANT_LINES))
    families: dict[str, Style] = {}
    for text in dict.fromkeys(methods):
        family, plain = family_of(text)
        if family not in METHODS and family not in families:
            families[family] = Style(*next(spare))
        own = METHODS.get(family) or families[family]
        if plain:
            found[text] = own
            continue
        marker = next(each for each in markers if each != own.marker)
        found[text] = Style(own.color, marker, False, next(lines))
    return found


def family_of(text: str) -> tuple[str, bool]:
    """Whose colour a method has, and whether it is that method itself: "booster:lam=1" -> ("booster", False).

    "sft+lisa" is Lisa as people know it, after plain alignment; "booster+lisa" is a variant of Lisa.
    """
    aligned, tuning = split_method(text)
    family = names.split_settings(tuning or aligned)[0]
    return family, text in (family, f"sft+{family}")
