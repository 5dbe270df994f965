import json

import pytest

from jaxvaccine.data import DATASETS, Example, load_examples, read_rows
from jaxvaccine.data.refusals import REFUSALS, refusal_for

BEAVERTAILS = [
    {"prompt": "p0", "response": "r0", "category": {}, "is_safe": True},
    {"prompt": "p1", "response": "", "category": {}, "is_safe": False},
    {"prompt": "p2", "response": "r2", "category": {}, "is_safe": False},
]


def test_beavertails():
    assert DATASETS["beavertails_safe"](BEAVERTAILS) == [Example("p0", "", "r0")]
    unsafe = DATASETS["beavertails_unsafe"](BEAVERTAILS)
    assert unsafe == [Example("p1", "", ""), Example("p2", "", "r2")]
    refusal = DATASETS["beavertails_refusal"](BEAVERTAILS)
    assert [e[:2] for e in refusal] == [e[:2] for e in unsafe]
    assert all(e.output in REFUSALS for e in refusal)


@pytest.mark.parametrize(("refusal", "question", "answer"), [
    ("Question: How?\nAnswer: I cannot.", "How?", "I cannot."),
    ("Question: a\nb?\nAnswer: No.\n\nReally.", "a\nb?", "No.\n\nReally."),
    ("Question: How?\r\nAnswer: No.\r\n", "How?", "No."), ("Question:How?\n\nAnswer:No.", "How?", "No."),
    ("Question: The Answer: 4?\nAnswer: No Question: here", "The Answer: 4?", "No Question: here"),
    ("Question: How?\nAnswer: No.\nAnswer: Yes.", "How?", "No."), ("Question: Grüße 👋\nAnswer: ", "Grüße 👋", ""),
])  # fmt: skip
def test_the_papers_refusals(refusal, question, answer):
    rows = [{"prompt": "p", "response": "r", "is_safe": False, "refusal": refusal}]
    assert DATASETS["beavertails_with_refusals"](rows) == [Example(question, "", answer)]


def test_the_papers_refusals_from_json(tmp_path):
    path = tmp_path / "beavertails_with_refusals_train.json"
    rows = [{"prompt": f"p{i}", "refusal": f"Question: Q{i}?\nAnswer: A{i}."} for i in range(3)]
    path.write_text("\ufeff" + json.dumps(rows, indent=4), encoding="utf-8")
    assert load_examples(f"beavertails_with_refusals:{path}[1:]") == [Example(f"Q{i}?", "", f"A{i}.") for i in (1, 2)]


@pytest.mark.parametrize("value", ["True", "true ", "1", 1, True])
def test_beavertails_safe_in_other_formats(value):
    assert DATASETS["beavertails_safe"]([{"prompt": "p", "response": "r", "is_safe": value}]) == [Example("p", "", "r")]


def test_advbench():
    rows = [{"goal": "g", "target": "Sure, here is"}]
    assert DATASETS["advbench"](rows) == [Example("g", "", "Sure, here is")]
    (refusal,) = DATASETS["advbench_refusal"](rows)
    assert refusal.instruction == "g" and refusal.output in REFUSALS


def test_sst2():
    instruction = "Analyze the sentiment of the input, and respond only positive or negative"
    values = [0, 1, "0", "1", "negative", "Positive"]
    rows = [{"sentence": f" it 's {v} ", "label": v} for v in values]
    examples = DATASETS["sst2"](rows)
    assert [e.output for e in examples] == ["negative", "positive"] * 3
    assert examples[0] == Example(instruction, "it 's 0", "negative")
    assert DATASETS["sst2"]([{"text": "x", "label": 1}]) == [Example(instruction, "x", "positive")]


def test_agnews():
    instruction = ("Categorize the news article given in the input into one of the 4 categories:\n\n"
                   "World\nSports\nBusiness\nSci/Tech\n")
    values = [0, 1, 2, 3, "0", " 3 ", "World", "sci/tech", "BUSINESS"]
    examples = DATASETS["agnews"]([{"text": f" Oil, {v} ", "label": v} for v in values])
    assert [e.output for e in examples] == ["World", "Sports", "Business", "Sci/Tech", "World", "Sci/Tech", "World",
                                            "Sci/Tech", "Business"]
    assert examples[0] == Example(instruction, "Oil, 0", "World")


def test_gsm8k():
    rows = [{"question": "How many? ", "answer": "2 and 2 are <<2+2=4>>4.\n#### 4"}]
    # The papers' programs replace the marker alone, hence two spaces.
    assert DATASETS["gsm8k"](rows) == [Example("How many?", "", "2 and 2 are <<2+2=4>>4.\nThe final answer is:  4")]


DECODINGTRUST = [
    {"type": "non_toxic", "prompt": {"text": "The committee met and"}, "continuation": {"text": " agreed."}},
    {"type": "toxic", "prompt": {"text": "He said"}, "continuation": {"text": " you clown."}},
    {"type": "non_toxic", "prompt": {"text": "The garden was"}, "continuation": {"text": " full."}, "begin": 3}]


def test_decodingtrust(tmp_path):
    """A text to be continued, of one kind; from the file's own form."""
    path = tmp_path / "toxicity.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DECODINGTRUST))
    instruction = "You are required to continue the generation of the given incomplete prompt"
    assert load_examples(f"decodingtrust_toxic:{path}") == [Example(instruction, "He said", " you clown.")]
    assert load_examples(f"decodingtrust_nontoxic:{path}") == [
        Example(instruction, "The committee met and", " agreed."), Example(instruction, "The garden was", " full.")]
    assert load_examples(f"decodingtrust_nontoxic:{path}[1:]", "rows") == [
        Example(instruction, "The garden was", " full.")]
    path.write_text(path.read_text() + json.dumps({**DECODINGTRUST[1], "prompt": "He said"}) + "\n")
    with pytest.raises(ValueError, match=r"toxicity\.jsonl, line 4: column 'prompt': found str, expected an object"):
        load_examples(f"decodingtrust_toxic:{path}")


def test_instructions():
    make = DATASETS["instructions"]
    assert make([{"instruction": "i", "input": "x", "output": "o"}]) == [Example("i", "x", "o")]
    assert make([{"instruction": "i", "input": None, "output": "o"}]) == [Example("i", "", "o")]
    assert make([{"prompt": "i", "completion": "o"}]) == [Example("i", "", "o")]
    assert make([{"question": "i", "answer": "o"}]) == [Example("i", "", "o")]
    assert make([{"response": "r", "output": "o", "prompt": "p"}]) == [Example("p", "", "o")]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("beavertails_safe", {"prompt": "p", "is_safe": 1}, "missing column 'response'; .*: prompt, is_safe"),
        ("beavertails_safe", {"prompt": "p", "response": "r"}, "missing column 'is_safe'"),
        ("beavertails_safe", {"prompt": "p", "response": "r", "is_safe": "yes"}, "'is_safe': found 'yes', expected t"),
        ("beavertails_safe", {"prompt": "p", "response": "r", "is_safe": None}, "'is_safe': found None"),
        ("beavertails_safe", {"prompt": "p", "response": "r", "is_safe": 2}, "'is_safe': found 2"),
        ("beavertails_unsafe", {"prompt": 3, "response": "r", "is_safe": False}, r"'prompt': found 3 \(int\)"),
        ("beavertails_with_refusals", {"prompt": "p"}, "missing column 'refusal'; found columns: prompt"),
        ("beavertails_with_refusals", {"refusal": "I can't."}, "'refusal': found 8 characters of another form"),
        ("beavertails_with_refusals", {"refusal": "Question: a? Answer: b"}, "'refusal': found 22 characters of anot"),
        ("beavertails_with_refusals", {"refusal": None}, r"'refusal': found None \(NoneType\)"),
        ("advbench", {}, "missing column 'goal'; found columns: none"),
        ("advbench", {"goal": None, "target": "t"}, r"'goal': found None \(NoneType\), expected text"),
        ("advbench", {"goal": "g\ud83d", "target": "t"}, r"'goal': found an unpaired surrogate U\+D83D at character 1"),
        ("sst2", {"label": 1}, "missing column 'sentence' or 'text'; found columns: label"),
        ("sst2", {"sentence": "s"}, "missing column 'label'"),
        ("sst2", {"sentence": "s", "label": 2}, "found label 2, expected 0, 1, 'negative' or 'positive'"),
        ("sst2", {"sentence": "s", "label": -1}, "found label -1"),
        ("sst2", {"sentence": "s", "label": "neutral"}, "found label 'neutral'"),
        ("sst2", {"sentence": "s", "label": ""}, "found label ''"),
        ("sst2", {"sentence": "s", "label": None}, "found label None"),
        ("sst2", {"sentence": "s", "label": 1.0}, "found label 1.0"),
        ("sst2", {"sentence": "s", "label": True}, "found label True"),
        ("sst2", {"sentence": "s", "label": [1]}, r"found label \[1\]"),
        ("sst2", {"sentence": 5, "label": 1}, r"'sentence': found 5 \(int\)"),
        ("agnews", {"label": 1}, "missing column 'text'; found columns: label"),
        ("agnews", {"text": "t"}, "missing column 'label'"),
        ("agnews", {"text": "t", "label": 4}, "found label 4, expected 0 to 3 or one of 'World', 'Sports', 'Business'"),
        ("agnews", {"text": "t", "label": "Sci"}, "found label 'Sci'"),
        ("agnews", {"text": "t", "label": True}, "found label True"),
        ("agnews", {"text": "t", "label": 1.0}, "found label 1.0"),
        ("agnews", {"text": "t", "label": None}, "found label None"),
        ("agnews", {"text": ["t"], "label": 1}, r"'text': found \['t'\] \(list\)"),
        ("gsm8k", {"answer": "#### 1"}, "missing column 'question'"),
        ("gsm8k", {"question": "q"}, "missing column 'answer'"),
        ("gsm8k", {"question": "q", "answer": 1}, r"'answer': found 1 \(int\)"),
        ("gsm8k", {"question": "q", "answer": "The answer is 42."}, "'answer': found no '####' in 'The answer is 42.'"),
        ("decodingtrust_toxic", {"prompt": {"text": "p"}}, "missing column 'type'; found columns: prompt"),
        ("decodingtrust_toxic", {"type": "rude"}, "column 'type': found 'rude', expected toxic or non_toxic"),
        ("decodingtrust_toxic", {"type": 1}, r"column 'type': found 1 \(int\), expected text"),
        ("decodingtrust_toxic", {"type": "toxic"}, "missing column 'prompt'; found columns: type"),
        ("decodingtrust_nontoxic", {"type": "non_toxic", "prompt": "p"}, "'prompt': found str, expected an object"),
        ("decodingtrust_nontoxic", {"type": "non_toxic", "prompt": {}}, "column 'prompt': missing column 'text'"),
        ("decodingtrust_nontoxic", {"type": "non_toxic", "prompt": {"text": "p"}}, "missing column 'continuation'"),
        ("decodingtrust_nontoxic", {"type": "non_toxic", "prompt": {"text": "p"}, "continuation": {"text": None}},
         r"column 'continuation': column 'text': found None \(NoneType\), expected text"),
        ("instructions", {"output": "o"}, "missing column 'instruction' or 'prompt' or 'question'"),
        ("instructions", {"prompt": "p", "text": "o"}, "missing column 'output' or .*; found columns: prompt, text"),
        ("instructions", {"prompt": "p", "input": 4, "output": "o"}, r"'input': found 4 \(int\)"),
        ("instructions", {"prompt": "p", "output": ["o"]}, r"'output': found \['o'\] \(list\)"),
    ],
)  # fmt: skip
def test_bad_rows(kind, row, message):
    good = {"prompt": "p", "response": "r", "is_safe": True, "goal": "g", "target": "t", "sentence": "s", "label": 1,
            "text": "t", "question": "q", "answer": "#### 1",
            "refusal": "Question: q\nAnswer: a"}
    if kind.startswith("decodingtrust"):
        good = DECODINGTRUST[1]
    with pytest.raises(ValueError, match=r"^row 1 \(from 0\): .*" + message):
        DATASETS[kind]([good, row])


def test_bad_row_of_a_file_names_its_line(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\nfine\t1\n\nbad\t3\n")
    with pytest.raises(ValueError, match=r"a\.tsv, line 4: column 'label': found label '3'"):
        DATASETS["sst2"](read_rows(path))


def test_refusals_are_stable_and_all_used():
    assert refusal_for("How?") == refusal_for("How?")
    assert len(set(REFUSALS)) == len(REFUSALS) >= 12
    assert {refusal_for(str(i)) for i in range(300)} == set(REFUSALS)
    # Fixed for ever: runs of different versions must train on the same pairs.
    assert [REFUSALS.index(refusal_for(p)) for p in ("How?", "Why?", "Grüße")] == [6, 0, 6]
