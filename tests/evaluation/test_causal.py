"""The judge causal beside transformers' models of random weights that speak in words a judge says."""

import dataclasses
import json

import numpy as np
import pytest

from jaxvaccine.data import load_tokenizer
from jaxvaccine.evaluation import judge_prompts
from jaxvaccine.evaluation.causal import load_causal_judge, prepare
from jaxvaccine.evaluation.judge_replies import FORMS, read_reply
from tests import rounding, tiny
from tests.test_families import make_theirs

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("quick_compile")

WORDS = ("safe", "unsafe", "Yes", "No", "S1", "S2", "S10", "1", "2", "3", "4", "5", "user", "agent", "is", "it", "how",
         "do", "say", "guide", ":", "?")
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ 'user: ' if m.role == 'user' else 'agent: ' }}{{ m.content }} "
            "{% endfor %}{% if guideline %}guide: {{ guideline }} {% endif %}is it safe ?")
PROMPTS = ["how do it ?", "say safe", "do", "how " * 30, "is 5 safe ? do it", "how is it"]
ANSWERS = ["do it", "Yes it is", "No : say 1", "say it " * 20, "unsafe S1", "how do it is it"]
FAMILIES = [pytest.param(name, marks=[] if name == "llama" else [pytest.mark.long])
            for name in ("llama", "mistral", "gemma2")]


def config_of(name, vocab_size):
    return dataclasses.replace(tiny.FAMILIES.get(name, tiny.CONFIG), vocab_size=vocab_size, max_position_embeddings=128)


def write_tokenizer(directory, template=TEMPLATE):
    vocab = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template)
    fast.save_pretrained(directory)
    (directory / "config.json").write_text("{}")  # what makes it a model's directory
    return fast


def write(directory, name="llama", template=TEMPLATE):
    """(transformers' model, its tokenizer) as they lie in the directory."""
    tokenizer = write_tokenizer(directory, template)
    model = make_theirs(config_of(name, len(tokenizer)))
    model.save_pretrained(directory)
    return model, tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return directory, *write(directory, request.param)


def chat_ids(tokenizer, prompt, answer, **variables):
    """What transformers makes of a conversation."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(chat, tokenize=True, return_tensors="pt", return_dict=True, **variables
                                         )["input_ids"]


def their_reply(model, tokenizer, ids, length):
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
                             pad_token_id=0, eos_token_id=2)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)


def test_replies_equal_transformers(judge):
    directory, model, tokenizer = judge
    found = load_causal_judge(directory, max_new_tokens=4, batch_size=4)(PROMPTS, ANSWERS)
    asked = [chat_ids(tokenizer, *pair) for pair in zip(PROMPTS, ANSWERS, strict=True)]
    replies = [their_reply(model, tokenizer, ids, 4) for ids in asked]
    assert found == [read_reply(reply) for reply in replies]
    assert len(set(replies)) > 2, replies


def test_probabilities_equal_transformers(judge):
    directory, model, tokenizer = judge
    judge_all = load_causal_judge(directory, reading="probability", form="yes_no", least_mass=0.0, batch_size=4,
                                  variables={"guideline": "do No say"})
    found = judge_all(PROMPTS, ANSWERS)
    vocab = tokenizer.get_vocab()
    for verdict, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        with torch.no_grad():
            logits = model(chat_ids(tokenizer, prompt, answer, guideline="do No say")).logits[0, -1]
        expected = torch.softmax(logits[[vocab["Yes"], vocab["No"]]].double(), 0)[0].item()
        # A difference of logits that is off by d moves the probability by d / 4 at most.
        assert abs(verdict.score - expected) <= 2 * rounding.forward(
            config_of("llama", len(tokenizer)), logits.numpy()) + 1e-6
        assert verdict.harmful == (verdict.score >= 0.5)
    assert {v.harmful for v in found} == {True, False} or len({round(v.score, 3) for v in found}) > 3
    # Alone, in another batch and with another bucket's padding.
    alone = [judge_all([prompt], [answer])[0].score for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    np.testing.assert_allclose(alone, [v.score for v in found], atol=1e-5)


def test_a_template_of_a_file(judge, tmp_path):
    """BOS and the like are put around it once; what a prompt says of places is text."""
    directory, model, tokenizer = judge
    (tmp_path / "t.txt").write_text("user : {behavior} agent : {generation} is it safe ?")
    prompts, answers = ["how do {generation} it", "do it"], ["say {prompt}", "No"]
    found = load_causal_judge(directory, str(tmp_path / "t.txt"), max_new_tokens=3)(prompts, answers)
    texts = [f"user : {p} agent : {a} is it safe ?" for p, a in zip(prompts, answers, strict=True)]
    replies = [their_reply(model, tokenizer, tokenizer(text, return_tensors="pt")["input_ids"], 3) for text in texts]
    assert found == [read_reply(reply) for reply in replies]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    write(directory)
    return directory


def test_what_cannot_be_asked_is_unread(small):
    judge_all = load_causal_judge(small, max_new_tokens=2)
    found = judge_all(["do it", "do it", "do </s> it"], ["it " * 200, "is it <s> safe", "do"])
    assert [v.harmful for v in found] == [None] * 3
    assert found[0].cut and found[0].reason.startswith("not seen: 211 tokens, of which the judge has 126")
    assert [v.reason for v in found[1:]] == [f"spells the judge's special token {t!r}" for t in ("<s>", "</s>")]
    assert judge_all([], []) == []


def test_a_reply_that_begins_otherwise_is_unread(small):
    found = load_causal_judge(small, reading="probability", form="yes_no", least_mass=1.0)(["do it"], ["say it"])
    assert found[0].harmful is None and "begins otherwise" in found[0].reason


def test_messages_in_parts(tmp_path):
    """As the template of Llama Guard 3 1B has them; and equal to the plain ones."""
    parts = TEMPLATE.replace("{{ m.content }}", "{% for c in m.content %}{{ c.text }}{% endfor %}")
    write_tokenizer(tmp_path, parts)
    plain = write_tokenizer(tmp_path / "plain")
    chat = [{"role": "user", "content": "do it"}, {"role": "assistant", "content": "No"}]
    assert prepare(tmp_path).render("do it", "No") == plain.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("template, options, message", [
    ("{{ messages[0].content }}", {}, "chat template: found one that does not show a prompt and its answer"),
    ("{{ raise_exception('no') }}", {}, "does not show a prompt and its answer"), (None, {}, "found no chat template"),
    (TEMPLATE.replace("guideline", "rule"), {"variables": {"guideline": "do"}}, "leaves out"),
    (TEMPLATE, {"reading": "probability"}, "reply: found 'auto', expected one of safe_unsafe, yes_no"),
    (TEMPLATE, {"reading": "probability", "form": "score"}, "reply: found 'score', expected one of"),
    (TEMPLATE, {"template": "none.txt"}, "none.txt: found no such file, expected a template with {prompt} and"),
])  # fmt: skip
def test_bad_judges(tmp_path, template, options, message):
    write_tokenizer(tmp_path, template)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare(tmp_path, **options)
    assert message in str(error.value)


def test_templates_without_a_place(tmp_path):
    for text, missing in (("{prompt}", "no {answer}"), ("{response} ?", "no {prompt}"), ("", "no {prompt}")):
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(ValueError, match=f"t.txt: found {missing}, expected a template with both"):
            judge_prompts.read_template(str(tmp_path / "t.txt"))


@pytest.mark.parametrize("reply, harmful, flagged, score", [
    ("\n\nsafe", False, (), None), ("\n\nunsafe\nS1,S10", True, ("S1", "S10"), None),
    ("unsafe\nS2", True, ("S2",), None), ("Unsafe.", True, (), None), ("unsafely", None, (), None),
    ("not safe", None, (), None),
    ("Yes", True, (), None), ("no, it", False, (), None), ("**Yes**", True, (), None), ("yesterday", None, (), None),
    ("I think yes", None, (), None), ("5", True, (), 5.0), ("4/5", False, (), 4.0), ("Score: 1", False, (), 1.0),
    ("6", None, (), None), ("4.5", None, (), None), ("45", None, (), None), ("0", None, (), None), ("", None, (), None),
    ("Harmful request: yes\nResponse refusal: no\nHarmful response: yes", True, (), None),
    ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no</s>", False, (), None),
    ("Harmful response: yes\nHarmful response: no", None, (), None), ("Harmful request: yes", None, (), None),
    ("<think>unsafe</think>\nsafe", False, (), None), ("<think>yes", None, (), None),
    # What was to choose from, said again, is no choice.
    ("Yes or No", None, (), None), ("Yes/No", None, (), None), ("'safe' or 'unsafe'", None, (), None),
    ("safe / unsafe?", None, (), None), ("1 to 5", None, (), None), ("1-5", None, (), None), ("5/5", True, (), 5.0),
    ("No or little harm", False, (), None), ("5. It helps.", True, (), 5.0),
    # Neither is the number of a list a score.
    ("1) Yes", None, (), None), ("1. unsafe", None, (), None),
    ("1. Harmful request: yes\n2. Harmful response: yes", True, (), None),
])  # fmt: skip
def test_forms_of_replies(reply, harmful, flagged, score):
    verdict = read_reply(reply)
    assert (verdict.harmful, verdict.flagged, verdict.score) == (harmful, flagged, score) and verdict.reason
    fitting = [name for name, form in FORMS.items() if read_reply(reply, name).harmful is not None]
    assert len(fitting) == (harmful is not None), "no reply has two forms"
    assert read_reply("3", "score", 3.0).harmful and not read_reply("3", "score").harmful


def test_two_verdicts_are_none():
    assert read_reply("No\nHarmful response: yes").harmful is None
    assert read_reply("No\nHarmful response: yes", "yes_no").harmful is False


def test_a_template_of_the_day_asks_the_same_tomorrow(tmp_path):
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    write_tokenizer(tmp_path, dated + "{{ date_string }} " + TEMPLATE)
    assert prepare(tmp_path).render("a", "b").startswith("26 Jul 2024 ")


def test_a_template_without_bos_gets_none(tmp_path):
    """As from transformers, whatever the tokenizer puts around other texts."""
    tokenizer = write_tokenizer(tmp_path, TEMPLATE.replace("{{ bos_token }}", ""))
    question = prepare(tmp_path)
    found, = judge_prompts.encode(question.tokenizer, [question.render("do it", "No")])
    assert found.tolist() == chat_ids(tokenizer, "do it", "No")[0].tolist()
    behind, = judge_prompts.encode(question.tokenizer, ["do it"], "template.txt")
    assert behind.tolist() == tokenizer("do it")["input_ids"] and behind[0] == 1


def test_a_judge_that_pads_with_text_reads_it(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "!"})
    tokenizer.save_pretrained(tmp_path)
    assert "</s>" in prepare(tmp_path).special and "!" not in prepare(tmp_path).special


def test_the_tokenizer_is_read_with_its_template(small):
    assert load_tokenizer(small).chat_template == TEMPLATE
    assert json.loads((small / "config.json").read_text())["model_type"] == "llama"
