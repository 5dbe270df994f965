"""Numbers as people, models and data sets write them, read exactly."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple


class Clock(NamedTuple):
    """A time of day, a score or a ratio: "5:30", "5:30 pm". Equal to what is written alike."""

    parts: tuple[int, ...]
    half: str = ""  # am, pm


Number = Decimal | Fraction | Clock

# One spelling of what is written in several ways. TeX's spaces and those of typography separate groups of digits.
_THIN = "\u2009"
_SPELLINGS = (
    (r"\\[dtc]?frac\s*([0-9])\s*([0-9])(?![0-9])", r" \1/\2 "),
    (r"\\(?:boxed|text|mathrm|mathbf|textbf)\s*", ""), (r"\\over(?![a-z])", "/"),
    (r"\{\s*,\s*\}", ","), (r"\\!|\\left|\\right", ""),
    (rf"\\[,;: ]|[~\u00a0\u2005-\u200a\u202f\u205f{_THIN}]", _THIN),
    (r"\\([$%€£])", r"\1"), (r"\\(?:times|cdot)(?![a-z])|[×·]", "*"), ("[\u2044\u2215／]", "/"),
    ("[\u2010-\u2013\u2212\ufe63\uff0d]", "-"), ("[\u2014\u2015]", "\u2014"), ("[’‘ʼ]", "'"), ("：", ":"),
    ("[，٬]", ","), ("[．٫]", "."), ("＝", "="), ("＄", "$"), ("％", "%"),
)  # fmt: skip
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_EXPONENT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
# Of anything but a number, such as a unit: m², ft^2, (a + b)^2.
_OTHER_EXPONENT = re.compile(r"(?<![0-9\s*^])\s?\^\s?(?:\{\s?-?[0-9]+\s?\}|-?[0-9]+)|\A\s*\^-?[0-9]+")

# Digits in groups: 1,234 and 1 234 and 1'234 and 1_234; 1,00,000 as in India; 1.234,50 and 1.234.567 as in Europe,
# where nothing else can be meant. Other commas and points separate numbers or end a sentence.
_GROUPED = "|".join(rf"[0-9]{{1,3}}(?:{separator}[0-9]{{3}})+" for separator in (",", _THIN, "'", "_"))
_EUROPEAN = r"[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]{1,2}(?![0-9]|,[0-9])|[0-9]{1,3}(?:\.[0-9]{3}){2,}(?!\.?[0-9])"
_PLAIN = rf"(?:(?:(?:{_GROUPED}|[0-9]{{1,2}}(?:,[0-9]{{2}})+,[0-9]{{3}})(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_POWER = r"\s?(?:\^|\*\*)\s?\{?\s?"
_VALUE = re.compile("|".join((
    r"(?P<date>[0-9]+(?:/[0-9]+){2,})",
    r"(?P<clock>[0-9]+(?::[0-9]+)+)(?:\s?(?P<half>[aApP])\.?[mM]\b)?",
    rf"(?P<whole>[0-9]+)[ {_THIN}]+(?P<part>[0-9]+)/(?P<parts>[0-9]+)(?![0-9])",
    rf"(?P<numerator>{_PLAIN})\s?/\s?(?:[$£€]\s?)?(?P<denominator>{_PLAIN})",
    rf"(?P<factor>{_PLAIN})\s?[*x]\s?10{_POWER}(?P<ten>-?[0-9]+)\}}?",
    rf"(?P<base>{_PLAIN}){_POWER}(?P<power>-?[0-9]+)\}}?",
    r"(?P<scientific>[0-9]+(?:\.[0-9]+)?[eE][-+]?[0-9]{1,3})(?!\w)",
    rf"(?P<european>{_EUROPEAN})", rf"(?P<plain>{_PLAIN})")))
# What makes another number of the one before it or behind it, one that is not read.
_BEFORE = re.compile(r"(?:√|\\sqrt\s*(?:\[[^\]]*\])?\s*\{?|±|\\pm)\s?$")
_BEHIND = re.compile(r"\s?(?:√|\\sqrt|π|\\pi|!(?=\s*$))")
_SIGN = re.compile(rf"([-\u2014])([ \t{_THIN}]*)[$£€¥₹]?[ {_THIN}]?$")
_MOST, _LONGEST = 60, 400  # larger exponents and longer numbers, in characters, are not read


def find_numbers(text: str) -> list[Number]:
    """All numbers in a text, exactly: "-$1,234.50" is -1234.5, "1/2" a half, "16-3" are 16 and 3."""
    return [value for value in find_values(text) if value is not None]


def find_values(text: str, marked: bool = False) -> list[Number | None]:
    """`find_numbers`, with None in the place of a number that is not read: √2, 1/2/2020, 2^-3, ±4.

    marked: the text begins behind what announces its number, so that a dash before that number is a sign even where a
      space or its length would make it a dash.
    """
    text = _spell(text)
    values: list[Number | None] = []
    for match in _VALUE.finditer(text):
        before, behind = text[:match.start()], text[match.end():]
        found = _read(match)
        if _BEFORE.search(before) or _BEHIND.match(behind):
            found = [None]
        if found[0] is not None and not isinstance(found[0], Clock) and _negative(before, behind, marked):
            found[0] = -found[0]
        values += found
    return values


def written(value: Number) -> str:
    """As `find_numbers` reads it again."""
    if isinstance(value, Clock):
        return ":".join(f"{part:02d}" if i else str(part) for i, part in enumerate(value.parts)) + value.half
    return str(value) if isinstance(value, Fraction) else f"{value:f}"


def _spell(text: str) -> str:
    text = "".join(str(unicodedata.decimal(c, c)) for c in text)
    # A vulgar fraction (½) is a numerator, a fraction slash and a denominator to NFKC.
    text = "".join(f" {unicodedata.normalize('NFKC', c)}" if unicodedata.category(c) == "No" and "\u2044" in
                   unicodedata.normalize("NFKC", c) else c for c in text)
    text = _EXPONENT.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = _FRACTION.sub(lambda found: f" {found[1]}/{found[2]} " if _is_plain(found[1]) and _is_plain(found[2])
                         else " √0 ", text)
    return _OTHER_EXPONENT.sub("", text)


def _is_plain(text: str) -> bool:
    return re.fullmatch(rf"\s*-?{_PLAIN}\s*", text) is not None


def _decimal(text: str) -> Decimal:
    return Decimal(re.sub(rf"[,{_THIN}'_]", "", text))


def _read(match: re.Match) -> list[Number | None]:
    of = match.groupdict()
    if len(match[0]) > _LONGEST:
        return [None]
    if of["plain"]:
        return [_decimal(of["plain"])]
    if of["clock"]:
        return [Clock(tuple(map(int, of["clock"].split(":"))), of["half"].lower() + "m" if of["half"] else "")]
    if of["whole"]:
        part, parts = int(of["part"]), int(of["parts"])
        if not parts:
            return [None]
        fraction = Fraction(part, parts)
        return [int(of["whole"]) + fraction] if part < parts else [Decimal(of["whole"]), fraction]
    if of["numerator"]:
        numerator, denominator = _decimal(of["numerator"]), _decimal(of["denominator"])
        return [Fraction(numerator) / Fraction(denominator) if denominator else None]
    if of["factor"]:
        exponent = int(of["ten"])
        return [_decimal(of["factor"]).scaleb(exponent) if abs(exponent) <= _MOST else None]
    if of["base"]:
        exponent = int(of["power"])
        base = Fraction(_decimal(of["base"]))
        return [base ** exponent if 0 <= exponent <= _MOST and base < 10**6 else None]
    if of["scientific"]:
        number = Decimal(of["scientific"])
        return [number if abs(number.adjusted()) <= _MOST else None]
    if of["european"]:
        return [Decimal(of["european"].replace(".", "").replace(",", "."))]
    return [None]  # a date


def _negative(before: str, behind: str, marked: bool) -> bool:
    """Whether the dash before a number, if there is one, is its sign.

    It is, unless something stands before it that it could be subtracted from (16-3). With a space behind it, and if it
    is a long one, it is a dash or a bullet, but right behind a colon, an equals sign or what marks the answer, and
    where there is nothing but the number.
    """
    sign = _SIGN.search(before)
    if not sign:
        return False
    ahead = before[:sign.start()]
    if sign[1] == "-" and not sign[2]:
        return not re.search(r"[\w.)%\]}]$", ahead)
    if not ahead.strip():
        return marked or not any(map(str.isalnum, behind))
    return re.search(r"[:=(#$\[{][ \t]*$", ahead) is not None
