import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.data.prompts import Example
from jaxvaccine.evaluation import score_answers, wilson_interval
from jaxvaccine.evaluation.labels import AGNEWS_LABELS, SST2_LABELS, contains_label, is_label, mentions_only

# answer, right label, strict, lenient
SST2 = [
    ("positive", "positive", True, True), ("Positive", "positive", True, True), (" positive\n", "positive", True, True),
    ("POSITIVE", "positive", True, True), ("Positive.", "positive", False, True),
    ("positive!", "positive", False, True),
    ("not positive", "positive", False, True), ("not positive", "negative", False, False),
    ("negative", "positive", False, False), ("negative", "negative", True, True),
    ("Negative.", "negative", False, True), ("positive or negative", "positive", False, False),
    ("positive, not negative", "positive", False, False), ("nonpositive", "positive", False, False),
    ("positively", "positive", False, False), ("positive positive", "positive", False, True),
    ("The sentiment is positive", "positive", False, True), ("Sentiment: Negative", "negative", False, True),
    ("**positive**", "positive", False, True), ('"positive"', "positive", False, True),
    ("(negative)", "negative", False, True), ("pos", "positive", False, False), ("1", "positive", False, False),
    ("", "positive", False, False), ("  ", "negative", False, False), ("...", "negative", False, False),
    ("neutral", "negative", False, False), ("positive\nnegative", "positive", False, False),
    ("positive/negative", "negative", False, False), ("positive_", "positive", False, False),
    ("ｐositive", "positive", False, False), ("I cannot say", "negative", False, False),
    ("positive\n\n### Instruction:", "positive", False, True), ("negative ", "negative", True, True),
]  # fmt: skip

AGNEWS = [
    ("World", "World", True, True), ("world", "World", True, True), (" World \n", "World", True, True),
    ("World.", "World", False, True), ("World News", "World", False, True), ("worldwide", "World", False, False),
    ("World", "Sports", False, False), ("Sports", "Sports", True, True), ("sport", "Sports", False, True),
    ("Sports.", "Sports", False, True), ("the world of sports", "Sports", False, False),
    ("sports", "Sports", True, True), ("BUSINESS", "Business", True, True), ("Business", "Business", True, True),
    ("not Business", "Business", False, True), ("busy-ness", "Business", False, False),
    ("Category: Business", "Business", False, True), ("Business, Sci/Tech", "Business", False, False),
    ("Business and World", "World", False, False), ("Sci/Tech", "Sci/Tech", True, True),
    ("sci/tech", "Sci/Tech", True, True), ("sci", "Sci/Tech", True, True), ("Sci", "Sci/Tech", True, True),
    ("SciTech", "Sci/Tech", False, True), ("Sci-Tech", "Sci/Tech", False, True),
    ("Sci / Tech", "Sci/Tech", False, True), ("Science/Technology", "Sci/Tech", False, True),
    ("Science and technology", "Sci/Tech", False, True), ("tech", "Sci/Tech", False, True),
    ("Sci/Tech.", "Sci/Tech", False, True), ("conscience", "Sci/Tech", False, False),
    ("sci", "World", False, False), ("", "Sci/Tech", False, False), ("3", "Sci/Tech", False, False),
    ("World\nSports\nBusiness\nSci/Tech", "World", False, False), ("Politics", "World", False, False),
]  # fmt: skip


# What T-Vaccine's program makes of the same answers: any that hold the label, small or with its first letter large.
CONTAINS = [
    ("positive", "positive", True), ("Positive.", "positive", True), ("POSITIVE", "positive", False),
    ("not positive", "positive", True), ("nonpositive", "positive", True), ("positively", "positive", True),
    ("positive or negative", "negative", True), ("negative", "positive", False), ("", "positive", False),
    ("World", "World", True), ("worldwide", "World", True), ("WORLD", "World", False), ("Sci/Tech", "Sci/Tech", True),
    ("conscience", "Sci/Tech", True), ("sci/tech", "Sci/Tech", True), ("Science", "Sci/Tech", False),
    ("sport", "Sports", False), ("World\nSports\nBusiness\nSci/Tech", "Business", True), ("busy", "Business", False)]


@pytest.mark.parametrize("answer, label, right", CONTAINS)
def test_t_vaccines_rule(answer, label, right):
    theirs = {"positive": ("positive", "Positive"), "negative": ("negative", "Negative"),  # from its pred_eval.py
              "Sci/Tech": ("Sci/Tech", "sci")}.get(label, (label, label.lower()))
    assert right == any(text in answer for text in theirs)
    assert contains_label(answer, label) == right
    task = "sst2" if label in SST2_LABELS else "agnews"
    found = score_answers(task, [Example("i", "t", label)], [answer], label_rule="contains")
    assert found.score == 100 * right and found.predictions[0].verdict == ("correct" if right else "wrong")
    assert (found.predictions[0].reason == "contains the label") == right
    assert found.details["lenient_accuracy"] == score_answers(
        task, [Example("i", "t", label)], [answer]).details["lenient_accuracy"]


@pytest.mark.parametrize("task, table", [("sst2", SST2), ("agnews", AGNEWS)])
def test_tables(task, table):
    labels = {"sst2": SST2_LABELS, "agnews": AGNEWS_LABELS}[task]
    assert len(table) >= 30
    for answer, label, strict, lenient in table:
        found = (is_label(answer, label), mentions_only(answer, label, labels))
        assert found == (strict, lenient), (answer, label)
    result = score_answers(task, [Example("i", "t", row[1]) for row in table], [row[0] for row in table])
    assert [p.counts for p in result.predictions] == [row[2] for row in table]
    assert result.score == pytest.approx(100 * sum(row[2] for row in table) / len(table))
    assert result.lenient.interval == wilson_interval(sum(row[3] for row in table), len(table))
    assert result.details["lenient_accuracy"] == result.lenient.score
    assert result.lenient.score == pytest.approx(100 * sum(row[3] for row in table) / len(table))


@settings(max_examples=50)
@given(st.sampled_from(list(AGNEWS_LABELS)), st.sampled_from(list(AGNEWS_LABELS)), st.text(" \n.!,/aS", max_size=5))
def test_what_is_right_by_the_strict_rule_is_right_by_the_lenient_one(label, answered, tail):
    answer = answered + tail
    assert not is_label(answer, label) or mentions_only(answer, label, AGNEWS_LABELS)
    assert sum(is_label(answer, other) for other in AGNEWS_LABELS) <= 1


def test_expected_is_the_labels_own_spelling():
    (prediction,) = score_answers("agnews", [Example("Sort.", "An article", " sci/tech ")], ["Sci/Tech."]).predictions
    assert prediction.expected == "Sci/Tech" and prediction.verdict == "wrong"
    assert prediction.reason == "contains the label, but is not equal to it"
