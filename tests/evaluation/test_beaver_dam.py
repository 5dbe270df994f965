"""beaver_dam beside transformers' LlamaForSequenceClassification, with tiny random weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine.checkpoints.hugging_face import load_classifier
from jaxvaccine.data import load_tokenizer
from jaxvaccine.data.prompts import Example
from jaxvaccine.evaluation import score_answers
from jaxvaccine.evaluation.beaver_dam import category_scores, encode, encode_conversations, load_beaver_dam
from tests import rounding
from tests.checkpoints.tiny import edit_json
from tests.data.tokenizers_for_tests import bos, plain

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

LABELS = [f"harm {i},of kinds" for i in range(14)]


def write(directory, tokenizer_kind=bos, seed=0, **fields):
    """A classifier as transformers saves one, with its tokenizer."""
    tokenizer = load_tokenizer(tokenizer_kind(directory))
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, pad_token_id=len(tokenizer),
        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
        problem_type="multi_label_classification")
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(directory)
    edit_json(directory / "config.json", **fields)
    return model, tokenizer


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("judge")
    return directory, *write(directory)


def theirs(model, rows, length=None):
    """Sigmoid of transformers' logits for right-padded rows."""
    length = length or max(map(len, rows))
    ids = torch.full((len(rows), length), model.config.pad_token_id)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
    with torch.no_grad():
        return torch.sigmoid(model(input_ids=ids, attention_mask=(ids != model.config.pad_token_id).long()).logits)


PROMPTS = ["How?", "Why is {this} so? 👋", "Grüße\n\n" * 30, "a b c " * 90]
ANSWERS = ["Sure.", "", "I cannot </s> do that.", "Step by step. " * 40]


def test_equals_transformers_padded_and_unpadded(judge_dir):
    directory, model, tokenizer = judge_dir
    rows = encode_conversations(tokenizer, PROMPTS, ANSWERS, 256)
    assert [row.size for row in rows][-1] == 256 and len({row.size for row in rows}) == 4
    classifier = load_classifier(directory)
    ours = category_scores(classifier, rows, batch_size=4, bucket=64)
    assert ours.shape == (4, 14) and ours.std() > 0.05
    tolerance = rounding.forward(classifier.model.config, 1)  # of probabilities
    np.testing.assert_allclose(ours, theirs(model, rows), atol=tolerance, rtol=0)
    np.testing.assert_allclose(ours, theirs(model, rows, 300), atol=tolerance, rtol=0)
    for i, row in enumerate(rows):
        alone = category_scores(classifier, [row], batch_size=1, bucket=1)
        np.testing.assert_allclose(alone, theirs(model, [row]), atol=tolerance, rtol=0)
        np.testing.assert_allclose(alone[0], ours[i], atol=tolerance, rtol=0)
    reversed_scores = category_scores(classifier, rows[::-1], batch_size=3)[::-1]
    np.testing.assert_allclose(reversed_scores, ours, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", [plain, bos])
def test_conversations_are_qa_moderations(tmp_path, kind):
    tokenizer = load_tokenizer(kind(tmp_path))
    (row,), (long,) = (encode_conversations(tokenizer, ["How?"], [answer], 64) for answer in ("No {x}.", "no " * 99))
    head = [tokenizer.bos_token_id] if kind is bos else []
    text = "BEGINNING OF CONVERSATION: USER: How? ASSISTANT:No {x}."
    assert row.tolist() == [*head, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert row.dtype == np.int32 and long.size == 64 and long[-1] != tokenizer.eos_token_id
    (once,) = encode_conversations(tokenizer, ["How?"], ["No {x}.</s>"], 64)
    assert once.tolist() == row.tolist(), "an EOS that is there already is not doubled"


def test_the_judge_flags_what_any_category_finds(judge_dir):
    directory, model, tokenizer = judge_dir
    prompts, answers = [*PROMPTS[:3], "a b c " * 30], ["So be it.", *ANSWERS[1:3], "Step by step, so it is. " * 40]
    rows = encode_conversations(tokenizer, prompts, answers, 256)
    scores = theirs(model, rows).numpy()
    threshold = float(np.sort(scores.max(axis=1))[1:3].mean())
    verdicts = load_beaver_dam(directory, threshold=threshold)(prompts, answers)
    assert [v.harmful for v in verdicts] == (scores.max(axis=1) > threshold).tolist()
    assert [v.cut for v in verdicts] == [False, False, False, True], "the last is longer than its 256 tokens"
    assert sum(v.harmful for v in verdicts) == 2
    for verdict, row in zip(verdicts, scores, strict=True):
        assert verdict.flagged == tuple(label for label, score in zip(LABELS, row, strict=True) if score > threshold)
        assert verdict.score == pytest.approx(row.max(), abs=1e-4) and LABELS[row.argmax()] in verdict.reason
    result = score_answers("harmful_score", [Example(p) for p in prompts], answers,
                           load_beaver_dam(directory, threshold=threshold))
    # The second answer is empty, and none.
    kept = [0, 2, 3]
    assert result.flagged == {label: int(n) for label, n in zip(LABELS, (scores[kept] > threshold).sum(axis=0),
                                                                strict=True) if n}
    assert (result.no_answer, result.cut, result.unread) == (1, 1, 0)
    assert result.score == 25 * sum(verdicts[i].harmful for i in kept)


def test_an_answer_behind_the_window_is_not_judged(judge_dir):
    """The verdict would be the prompt's; where the first token of the answer is in the window there is one."""
    directory, _, tokenizer = judge_dir
    (whole,) = encode(tokenizer, ["Why is it so? " * 9], ["Step by step, like this."])
    for window, seen in ((whole.answer, False), (whole.answer + 1, True), (whole.ids.size, True)):
        judge = load_beaver_dam(directory, max_length=window, threshold=0.0)
        (verdict,) = judge(["Why is it so? " * 9], ["Step by step, like this."])
        assert (verdict.harmful, verdict.cut) == (True if seen else None, window < whole.ids.size)
        assert verdict.word == ("harmful" if seen else "unread") and ("not seen" in verdict.reason) != seen
    opposite = judge(["Why is it so? " * 9] * 2 + ["Why?"], ["Sure, like this: one, two.", "I cannot do that.", "So."])
    assert [v.harmful for v in opposite] == [True, True, True]
    narrow = load_beaver_dam(directory, max_length=whole.answer, threshold=0.0)
    assert [v.harmful for v in narrow(["Why is it so? " * 9] * 2 + ["Why?"], ["Yes, so.", "No, not so.", "So."])] == [
        None, None, True]


@pytest.mark.parametrize("prompt, answer", [("How?", "Sure."), ("Grüße 👋", "日本"), ("</s> a", "</s> b"), ("", "x"),
                                            ("a {answer} {prompt}", "{prompt}")])
def test_where_the_answer_begins(judge_dir, prompt, answer):
    tokenizer = judge_dir[2]
    (found,) = encode(tokenizer, [prompt], [answer])
    text = tokenizer.decode(found.ids[found.answer:].tolist(), skip_special_tokens=False)
    assert text.removesuffix("</s>").strip() == answer


@pytest.mark.parametrize("fields, message", [
    ({"problem_type": "single_label_classification"}, "field 'problem_type': found 'single_label_classification'"),
    ({"id2label": None}, "field 'id2label': found None, expected the names of labels"),
    ({"id2label": {"1": "a", "2": "b"}}, "field 'id2label': found {'1': 'a', '2': 'b'}"),
    ({"id2label": {str(i): "x" for i in range(13)}}, r"'score.weight': found shape \[14, 32\], expected \[13, 32\]"),
    ({"vocab_size": 99}, r"embed_tokens.weight': found shape"), ({"model_type": "mistral"}, "expected 'llama'"),
])  # fmt: skip
def test_damaged_configs(tmp_path, fields, message):
    write(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load_beaver_dam(tmp_path)


def test_a_model_without_a_head(model_dir_without_head):
    with pytest.raises(ValueError, match=r"tensor 'score\.weight': missing, expected shape"):
        load_classifier(model_dir_without_head)


@pytest.fixture
def model_dir_without_head(tmp_path):
    write(tmp_path)
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["score.weight"]
    save_file(tensors, path)
    return tmp_path


def test_scores_that_overflow_are_errors(judge_dir):
    classifier = load_classifier(judge_dir[0])
    classifier = classifier._replace(head=classifier.head * np.nan)
    with pytest.raises(FloatingPointError, match="scores of answer 0"):
        category_scores(classifier, [np.arange(5, dtype=np.int32)])


def test_reduced_precision_and_shards(tmp_path):
    model, tokenizer = write(tmp_path / "one")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "many")
    assert "score.weight" in json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    classifier = load_classifier(tmp_path / "many")
    assert classifier.head.dtype == "bfloat16" and classifier.model.dtype == jnp.bfloat16
    rows = encode_conversations(tokenizer, PROMPTS[:2], ANSWERS[:2])
    in_float32 = category_scores(load_classifier(tmp_path / "many", dtype="float32"), rows)
    # Read back, since .to() rounds the rotary frequencies too.
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "many", dtype=torch.float32).eval()
    tolerance = rounding.forward(classifier.model.config, 1)
    np.testing.assert_allclose(in_float32, theirs(model, rows), atol=tolerance, rtol=0)
    np.testing.assert_allclose(category_scores(classifier, rows), in_float32, atol=0.1)
