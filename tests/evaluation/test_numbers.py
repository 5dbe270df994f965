import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data.prompts import Example
from jaxvaccine.evaluation import score_answers
from jaxvaccine.evaluation.numbers import find_answer
from jaxvaccine.evaluation.quantities import Clock, find_numbers, find_values, written

# answer, number found in it
ANSWERS = [
    ("#### 42", "42"), ("####42", "42"), ("3 + 4 = 7\n#### 7", "7"), ("#### 1,234", "1234"),
    ("#### $1,234.50", "1234.5"), ("#### -3", "-3"), ("####-3", "-3"), ("#### -$3", "-3"), ("#### $-3", "-3"),
    ("#### −3", "-3"), ("#### 18.00", "18"), ("#### 7.", "7"), ("#### 5 apples, 6 pears", "5"),
    ("#### 5\n\nQ: another one\n#### 6", "5"), ("#### unknown, 9", "9"), ("7 ####", "7"), ("#### ?\n8", "8"),
    ("The final answer is:  18", "18"), ("the final answer is: 18", "18"), ("The final answer is: $2,000", "2000"),
    ("The final answer is: 3. Or is it 4?", "3"), ("She has 5, then 9.", "9"), ("It costs $1,234.50.", "1234.5"),
    ("so -3", "-3"), ("16-3", "3"), ("16 - 3 = 13", "13"), ("16-3=13.", "13"), ("1,2,3", "3"), ("1, 2, 3", "3"),
    ("1,000,000", "1000000"), ("12,34", "34"), ("0.5", "0.5"), (".5", "0.5"), ("50%", "50"), ("<<2*3=6>>6", "6"),
    ("10 apples and 20 pears", "20"), ("x2", "2"), ("3rd of 4", "4"), ("007", "7"),
    ("99999999999999999999999", "99999999999999999999999"), ("", None), ("   ", None), ("no idea", None),
    ("####", None), ("five", None), ("-", None), ("$", None), (",", None), ("²", None),
]  # fmt: skip


# answer, number found in it: "a/b" is a fraction
WRITTEN = [
    (r"\boxed{\$9{,}500}", "9500"), (r"$1,\!000$", "1000"), (r"1{,}234{,}567.5", "1234567.5"), (r"2\,500", "2500"),
    (r"12\;345 km", "12345"), ("1\u202f000", "1000"), ("1\u2009234\u2009567", "1234567"), ("1\u00a0000", "1000"),
    ("1’000", "1000"), ("1'234'567.8", "1234567.8"), ("1_000", "1000"), ("1,00,000", "100000"),
    ("12,34,567", "1234567"),
    ("1.000,50", "1000.5"), ("1.234.567", "1234567"), ("1.000", "1"), ("- 3", "-3"), ("–3", "-3"), ("—3", "-3"),
    ("‐3", "-3"), ("－３", "-3"), ("- $3", "-3"), ("-€ 3", "-3"), ("x = - 3", "-3"), ("(-3)", "-3"), ("$-3$", "-3"),
    ("10–12", "12"), ("10 - 12", "12"), ("It is - 3 apples", "3"), ("- 3 apples\n- 4 pears", "4"), ("5 — 3", "3"),
    ("1/2", "1/2"), ("-1/2", "-1/2"), ("6 / 8", "3/4"), ("2 1/2 cups", "5/2"), ("½", "1/2"), ("1½", "3/2"),
    ("3⁄4", "3/4"),
    (r"\frac{3}{4}", "3/4"), (r"\dfrac{1}{3}", "1/3"), (r"\frac12", "1/2"), (r"1\frac{1}{2}", "3/2"),
    (r"-\frac{3}{4}", "-3/4"), (r"{3 \over 4}", "3/4"), (r"\boxed{\frac{1{,}000}{3}}", "1000/3"), ("$5/$2", "5/2"),
    ("20/4 = 5", "5"), ("5/day", "5"), ("9 m²", "9"), ("9m²", "9"), ("9 ft^2", "9"), ("9 cm^{3}", "9"), ("5²", "25"),
    ("2³ = 8", "8"), ("10^3", "1000"), ("2^{10}", "1024"), ("3 × 10^4", "30000"), (r"3 \times 10^{4}", "30000"),
    ("1.5e3", "1500"), ("2.5 × 10⁻¹", "0.25"), ("4 × 5 = 20", "20"), ("１２", "12"), ("１，０００", "1000"),
    ("٣٤", "34"),
    ("१२", "12"), ("𝟏𝟐", "12"), ("١٬٠٠٠٫٥", "1000.5"), ("50 %", "50"), (r"50\%", "50"), (r"\text{18 dollars}", "18"),
    # What is not read is no other number.
    (r"\sqrt{2}", None), ("√2", None), (r"3\sqrt{2}", None), ("2π", None), (r"2\pi", None), ("±3", None),
    (r"\pm 3", None),
    ("1/2/2020", None), ("1/0", None), (r"\frac{x}{4}", None), (r"\frac{1}{x+2}", None), ("10^-3", None),
    ("10⁻³", None),
    ("2^999", None), ("9" * 500, None), ("x²", None), ("(a + b)^2", None),
]  # fmt: skip


@pytest.mark.parametrize("text, number", WRITTEN)
def test_numbers_as_people_write_them(text, number):
    """As the last number, as the marked one, and within a sentence."""
    value = None if number is None else Fraction(number)
    assert find_answer(text) == value
    # A bullet or a dash right behind the marker is a sign, and the first number is the answer.
    if len(find_values(text)) == 1:
        assert find_answer(f"1 + 1 = 2\n#### {text}\n7 more") == value
        assert find_answer(f"The final answer is: {text}.") in (value, value and -abs(value))


def test_times_and_ratios():
    assert find_answer("5:30") == Clock((5, 30)) != find_answer("5:45")
    assert find_answer("#### 5:30 p.m.") == find_answer("5:30 PM") != find_answer("5:30 AM")
    assert written(find_answer("at 5:05 am")) == "5:05am" and find_answer("1:2:3") == Clock((1, 2, 3))
    assert find_numbers("From 5:30 on, 12 of them") == [Clock((5, 30)), 12]


@settings(max_examples=100)
@given(st.fractions(max_denominator=999).filter(lambda f: f.denominator > 1), st.sampled_from(["{}/{}", "{} / {}",
       r"\frac{{{}}}{{{}}}", r"\dfrac{{ {} }}{{ {} }}", "{}\u2044{}"]))
def test_fractions(value, form):
    text = ("-" if value < 0 else "") + form.format(abs(value.numerator), value.denominator)
    assert find_answer(f"So #### {text}") == value and find_answer(text) == value
    assert find_answer(written(value)) == value


@settings(max_examples=100)
@given(st.integers(0, 10**12), st.sampled_from([",", "{,}", "\u2009", "\u202f", "\u00a0", r"\,", r",\!", "'", "’"]),
       st.sampled_from(["0123456789", "０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩"]),
       st.sampled_from(["", "-", "–", "- ", "−"]))
def test_groups_digits_and_signs(value, separator, digits, sign):
    text = f"{value:,}".replace(",", separator).translate(str.maketrans("0123456789", digits))
    expected = -value if sign else value
    assert find_answer(f"The final answer is: {sign}{text}.") == expected
    assert find_answer(f"2 + 2 = 4\n#### {sign}{text} km²") == expected


@settings(max_examples=100)
@given(st.text("0123456789.,-–/:^ ²½{}\\$%e#", max_size=30))
def test_any_text(text):
    for value in find_numbers(text):
        assert find_answer(f"#### {written(value)}") == value
    score_answers("gsm8k", [Example("q", "", "3")], [text])


def test_answers():
    assert len(ANSWERS) >= 30
    for answer, number in ANSWERS:
        assert find_answer(answer) == (None if number is None else Decimal(number)), answer


def authors_number(sentence, marker="The final answer is: "):
    """Written from what Booster's and T-Vaccine's gsm8k/pred_eval.py do."""
    sentence = sentence.replace(",", "")
    number = r"-?\d+\.?\d*"
    found = re.findall(number, sentence)
    behind = re.findall(number, sentence.split(marker)[1]) if marker in sentence else []
    return float((behind[:1] or found[-1:] or ["inf"])[0])


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["Tom has", "5", "$1,234.50", "-3", "0.25", "+", "eggs.", "The final answer is: ", "12",
                                 "7.", "1,000 of", "\n", "<<3*4=12>>12"]), max_size=8))
def test_equals_the_authors_rule(parts):
    text = " ".join(parts)
    found = find_answer(text)
    assert (float("inf") if found is None else float(found)) == authors_number(text)


@settings(max_examples=50)
@given(st.decimals(-10**12, 10**12, allow_nan=False, places=2))
def test_every_way_to_write_a_number(value):
    for text in (f"{value}", f"{value:,}", f"-${-value:,}" if value < 0 else f"${value:,}"):
        assert find_numbers(f"It is {text}.") == [value]
        assert find_answer(f"1 + 1 = 2\n#### {text}\n9 more") == value


# answer, expected, strict, lenient
SCORES = [
    ("#### 18", "18", True, True), ("18", "#### 18", True, True),
    ("#### 18.0", "The final answer is:  18", True, True),
    ("$18", "18", True, True), ("18 dollars", "18", True, True), ("1,8", "18", False, False),
    ("-18", "18", False, False),
    ("#### 18, not 17", "18", True, True), ("18, then 17", "18", False, True), ("#### 17\n18", "18", False, True),
    ("180", "18", False, False), ("1.8", "18", False, False), ("", "18", False, False),
    ("eighteen", "18", False, False), ("1/3", "1/2", False, False), ("0.5", "1/2", True, True),
    ("3", r"\frac{3}{4}", False, False),
    (r"\frac{6}{8}", "3/4", True, True), ("5:45", "5:30", False, False), ("5:30", "5:30", True, True),
    ("1 or 1/2", "1/2", True, True), ("1/2, not 1", "1/2", False, True), ("5²", "5", False, False),
    ("5²", "25", True, True),
    ("18²", "18", False, False), ("−18", "-18", True, True), ("- 18", "-18", True, True),
    ("- 18 of\n- 19", "-19", False, False),
]  # fmt: skip


def test_scores():
    for answer, expected, strict, lenient in SCORES:
        result = score_answers("gsm8k", [Example("q", "", expected)], [answer])
        assert (result.score, result.details) == (100 * strict, {"lenient_accuracy": 100 * lenient}), answer
    reasons = [score_answers("gsm8k", [Example("q", "", "3")], [a]).predictions[0].reason for a in ("", "no", "-3.50")]
    assert reasons == ["empty answer", "no number", "answers -3.50"]
    assert score_answers("gsm8k", [Example("q", "", "2 and\n#### 1,000")], ["1"]).predictions[0].expected == "1000"
