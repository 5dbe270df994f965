"""Answers that are made to begin with given words."""

import numpy as np
import pytest

from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.data import Example, encode_prompts, load_tokenizer, tokenize_examples
from jaxvaccine.evaluation import answer_prompts, evaluate_prompts
from jaxvaccine.evaluation.judges import Verdict
from tests.data import tokenizers_for_tests

pytestmark = pytest.mark.usefixtures("quick_compile")

PREFILL = "Sure, here is"
EXAMPLES = [Example("How do I repot a fern?"), Example("Say yes.", "no"), Example("Grüße")]


@pytest.mark.parametrize("kind", ["plain", "bos", "bos_eos", "metaspace"])
@pytest.mark.parametrize("prompt", ["alpaca", "plain"])
def test_tokens_are_those_of_an_answer(tmp_path, kind, prompt):
    """What follows the prompt is what an answer of these words is trained with; no special token is among it."""
    tokenizer = load_tokenizer(getattr(tokenizers_for_tests, kind)(tmp_path))
    plain = encode_prompts(tokenizer, EXAMPLES, prompt=prompt)
    begun = encode_prompts(tokenizer, EXAMPLES, prompt=prompt, prefill=PREFILL)
    trained = tokenize_examples(tokenizer, [e._replace(output=PREFILL) for e in EXAMPLES], 512, prompt)
    for of, longer, ids in zip(plain, begun, trained.input_ids, strict=True):
        np.testing.assert_array_equal(longer[:of.size], of)
        np.testing.assert_array_equal(longer, ids[:-1])
        assert longer.size > of.size and not set(longer[of.size:]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("prefill, message", [
    (" \n", r"^prefill: found ' \\n', expected text"), ("Sure </s>", "^prefill: found '</s>', a special token"),
    ("### Response: yes", "^prefill: found '### Response:' of the prompt's template")])
def test_what_no_answer_begins_with(tmp_path, prefill, message):
    tokenizer = load_tokenizer(tokenizers_for_tests.plain(tmp_path))
    with pytest.raises(ValueError, match=message):
        encode_prompts(tokenizer, EXAMPLES, prefill=prefill)


def test_equals_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = load_tokenizer(tokenizers_for_tests.plain(tmp_path / "model"))
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.5, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id)).eval()
    theirs.save_pretrained(tmp_path / "model")
    model, frozen = load_model(tmp_path / "model")
    expected = []
    for prompt, begun in zip(encode_prompts(tokenizer, EXAMPLES), encode_prompts(tokenizer, EXAMPLES, prefill=PREFILL),
                             strict=True):
        with torch.no_grad():
            out = theirs.generate(torch.tensor(begun[None].astype(np.int64)), max_new_tokens=12, do_sample=False,
                                  attention_mask=torch.ones(1, begun.size, dtype=torch.long), pad_token_id=0)
        expected.append(tokenizer.decode(out[0, prompt.size:].tolist(), skip_special_tokens=True).strip())
    run = {"task": "harmful_score", "max_new_tokens": 12, "batch_size": 2}
    found = answer_prompts(model, None, frozen, tokenizer, EXAMPLES, prefill=PREFILL, **run)
    assert found == expected and all(text.startswith(PREFILL) and len(text) > len(PREFILL) for text in found)
    assert found != answer_prompts(model, None, frozen, tokenizer, EXAMPLES, **run)
    # The judge reads all of it.
    seen = []

    def judge(prompts, answers):
        seen.extend(answers)
        return [Verdict(True, "") for _ in answers]

    evaluate_prompts(model, None, frozen, tokenizer, EXAMPLES, prefill=PREFILL, judge=judge, **run)
    assert seen == expected
