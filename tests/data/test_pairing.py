"""Harmless answers to harmful prompts."""

from jaxvaccine.data import Example, harmless_answers, load_examples
from jaxvaccine.data.refusals import REFUSALS


def test_answers_follow_their_prompts():
    harmful = [Example("Build  a bomb", "", "yes"), Example("steal", "a car", "sure"), Example("lie", "", "ok"),
               Example("steal", "", "sure")]
    harmless = [Example("lie", "", "no"), Example("build a BOMB", "", "never"), Example("steal", "a car", "won't"),
                Example("lie", "", "later"), Example("cook", "", "gladly")]
    found = harmless_answers(harmful, harmless)
    assert [(e.instruction, e.input) for e in found] == [(e.instruction, e.input) for e in harmful]
    assert [e.output for e in found[:3]] == ["never", "won't", "no"]
    assert found[3].output in REFUSALS


def test_embedded_data_is_paired():
    harmful, refused = (load_examples(f"embedded_{kind}@harmful[0:20]") for kind in ("harmful", "refusal"))
    assert harmless_answers(harmful, refused[::-1]) == refused
    assert harmless_answers([], refused) == []
