"""Where answers end: at any EOS id of the model's files, and at stop strings, as transformers' generate ends."""

import json

import numpy as np
import pytest

from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.data import Example, encode_prompts, eos_ids, load_tokenizer
from jaxvaccine.evaluation import answer_prompts
from jaxvaccine.evaluation.answers import decode_answer, find_stop, split_stop, tokens_to_stop
from jaxvaccine.evaluation.generate import generate
from tests.checkpoints.instruct import save_instruct
from tests.data.chat_models import save_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")

EXAMPLES = [Example("How do I repot a fern?"), Example("Say yes.", "no"), Example("Hello"), Example("Name a colour.")]
FAMILIES = ["llama3", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("mistral", "qwen2", "gemma2"))]
NEW = 24


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    return save_instruct(request.param, tmp_path_factory.mktemp(request.param))


def theirs(path, prompts, **options):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    found = []
    for prompt in prompts:
        with torch.no_grad():
            out = model.generate(torch.tensor(prompt[None].astype(np.int64)), max_new_tokens=NEW, do_sample=False,
                                 attention_mask=torch.ones(1, prompt.size, dtype=torch.long), pad_token_id=0, **options)
        found.append(out[0, prompt.size:].numpy())
    return found


def test_any_eos_id(path, tmp_path):
    """Two more ids in generation_config.json, of tokens that come early in some answers."""
    tokenizer, (model, frozen) = load_tokenizer(path), load_model(path)
    prompts = encode_prompts(tokenizer, EXAMPLES, prompt="chat")
    free = generate(model, None, frozen, prompts, max_new_tokens=NEW, eos_ids=())
    ids = sorted({int(free[0][5]), int(free[1][9]), *eos_ids(tokenizer)})
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = load_tokenizer(path)
    assert eos_ids(tokenizer) == tuple(ids)
    found = generate(model, None, frozen, prompts, max_new_tokens=NEW, eos_ids=eos_ids(tokenizer))
    for ours, expected in zip(found, theirs(path, prompts), strict=True):
        ended = expected[-1] in ids
        np.testing.assert_array_equal(ours, expected[:-1] if ended else expected)
        assert ended or ours.size == NEW
    assert {a.size for a in found} - {NEW} and found[0].size <= 5


def test_stop_strings(path):
    """They begin and end within tokens; the answer is what comes before the first of them, and nothing more of the row
    is computed than the token that completes it."""
    tokenizer, (model, frozen) = load_tokenizer(path), load_model(path)
    prompts = encode_prompts(tokenizer, EXAMPLES, prompt="chat")
    free = generate(model, None, frozen, prompts, max_new_tokens=NEW, eos_ids=())
    stop = [within(tokenizer, free[0], 4), within(tokenizer, free[1], 11)]
    kept = {}

    def stops(i, ids, seen):
        return tokens_to_stop(tokenizer, ids, stop, seen=seen)

    found = generate(model, None, frozen, prompts, max_new_tokens=NEW, eos_ids=(), batch_size=2, stops=stops,
                     keep=kept.update)
    expected = theirs(path, prompts, stop_strings=stop, tokenizer=tokenizer, eos_token_id=-1)
    for i in range(4):
        np.testing.assert_array_equal(found[i], expected[i])
        np.testing.assert_array_equal(kept[i], found[i])
    assert found[0].size <= 7 and found[1].size <= 14
    texts = answer_prompts(model, None, frozen, tokenizer, EXAMPLES, task="harmful_score", prompt="chat", stop=stop,
                           max_new_tokens=NEW, eos_ids=(), batch_size=2)
    for text, ids in zip(texts, free, strict=True):
        whole = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        assert text == whole[:find_stop(whole, stop)].strip()


def within(tokenizer, ids, at):
    """A text from inside of token `at` to the first letter of the one behind the next."""
    before, three = (tokenizer.decode(ids[:end].tolist(), skip_special_tokens=True) for end in (at, at + 3))
    stop = three[len(before) + 1:][:4]
    assert stop and "\ufffd" not in stop
    return stop


def test_text_and_tokens(tmp_path):
    """Of what is generated alone; a special token by its id; the first of several; none."""
    tokenizer = load_tokenizer(save_tokenizer("qwen2", tmp_path))
    ids = np.asarray(tokenizer("Sure: one. two. three", add_special_tokens=False)["input_ids"])
    texts = [tokenizer.decode(ids[:n].tolist()) for n in range(len(ids) + 1)]
    for stop in (["o. t"[1:]], ["two", "one."], ["e"]):
        count = tokens_to_stop(tokenizer, ids, stop)
        assert find_stop(texts[count], stop) is not None and find_stop(texts[count - 1], stop) is None
        assert tokens_to_stop(tokenizer, ids, stop, seen=count - 1) == count
    assert tokens_to_stop(tokenizer, ids, ["four"]) is None
    fixed = next(n for n, text in enumerate(texts) if "one" in text)
    assert decode_answer(tokenizer, ids, ["e"], fixed, chat=True) == "Sure: one. two. thr"
    assert tokens_to_stop(tokenizer, ids, ["one"], fixed) is None
    assert split_stop(tokenizer, ["<|im_end|>", "a"]) == ((tokenizer.convert_tokens_to_ids("<|im_end|>"),), ("a",))
    with pytest.raises(ValueError, match=r"^stop: found"):
        split_stop(tokenizer, ["a", ""])


def test_a_chat_may_say_what_ends_other_answers(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer("qwen2", tmp_path))
    ids = np.asarray(tokenizer("Ask so:\n### Response:\nyes", add_special_tokens=False)["input_ids"])
    assert decode_answer(tokenizer, ids) == "Ask so:"
    assert decode_answer(tokenizer, ids, chat=True) == "Ask so:\n### Response:\nyes"
