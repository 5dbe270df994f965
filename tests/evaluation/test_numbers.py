import re
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data.prompts import Example
from jaxvaccine.evaluation import score_answers
from jaxvaccine.evaluation.numbers import find_answer, find_numbers

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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["Tom has", "5", "$1,234.50", "-3", "0.25", "+", "eggs.", "The final answer is: ", "12",
                                 "7.", "1,000 of", "\n", "<<3*4=12>>12"]), max_size=8))
def test_equals_the_authors_rule(parts):
    text = " ".join(parts)
    found = find_answer(text)
    assert (float("inf") if found is None else float(found)) == authors_number(text)


@settings(max_examples=50, deadline=None)
@given(st.decimals(-10**12, 10**12, allow_nan=False, places=2))
def test_every_way_to_write_a_number(value):
    for written in (f"{value}", f"{value:,}", f"-${-value:,}" if value < 0 else f"${value:,}"):
        assert find_numbers(f"It is {written}.") == [value]
        assert find_answer(f"1 + 1 = 2\n#### {written}\n9 more") == value


# answer, expected, strict, lenient
SCORES = [
    ("#### 18", "18", True, True), ("18", "#### 18", True, True),
    ("#### 18.0", "The final answer is:  18", True, True),
    ("$18", "18", True, True), ("18 dollars", "18", True, True), ("1,8", "18", False, False),
    ("-18", "18", False, False),
    ("#### 18, not 17", "18", True, True), ("18, then 17", "18", False, True), ("#### 17\n18", "18", False, True),
    ("180", "18", False, False), ("1.8", "18", False, False), ("", "18", False, False),
    ("eighteen", "18", False, False),
]  # fmt: skip


def test_scores():
    for answer, expected, strict, lenient in SCORES:
        result = score_answers("gsm8k", [Example("q", "", expected)], [answer])
        assert (result.score, result.details) == (100 * strict, {"lenient_accuracy": 100 * lenient}), answer
    reasons = [score_answers("gsm8k", [Example("q", "", "3")], [a]).predictions[0].reason for a in ("", "no", "-3.50")]
    assert reasons == ["empty answer", "no number", "answers -3.50"]
    assert score_answers("gsm8k", [Example("q", "", "2 and\n#### 1,000")], ["1"]).predictions[0].expected == "1000"
