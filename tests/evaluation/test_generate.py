import functools
import importlib
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.checkpoints import smollm2
from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.data import encode_prompts, load_examples, load_tokenizer
from jaxvaccine.evaluation import decoding
from jaxvaccine.evaluation.generate import generate
from jaxvaccine.evaluation.sampling import GREEDY, Sampling
from jaxvaccine.llama import Llama, hidden_states, init_adapter, init_frozen, token_logits
from jaxvaccine.llama_config import LlamaConfig, LoraConfig
from jaxvaccine.merging import merge_adapter

pytestmark = pytest.mark.usefixtures("quick_compile")

MODULE = importlib.import_module("jaxvaccine.evaluation.generate")
CONFIG = LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=4, max_position_embeddings=64, tie_word_embeddings=True)
MODEL = Llama(CONFIG, LoraConfig(rank=3, alpha=6.0))


def spread(tree, key, scale):
    """Random leaves wide enough that argmax changes from token to token, and no two logits come near each other."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


FROZEN = spread(init_frozen(MODEL, jax.random.key(0)), jax.random.key(1), 0.4)
ADAPTER = spread(init_adapter(MODEL, jax.random.key(2)), jax.random.key(3), 0.4)
MANY = [np.random.default_rng(i).integers(0, 23, 30 if i == 5 else 1 + i % 9).astype(np.int32) for i in range(40)]
SAMPLED = Sampling(1.0, top_k=9, top_p=0.9, seed=3)
PROMPTS = [np.random.default_rng(i).integers(0, 23, n).astype(np.int32) for i, n in enumerate((1, 2, 5, 8, 3, 13, 16))]


@pytest.fixture(scope="module")
def next_token():
    """The oracle's step: no cache, no batch, one padded length (causal, so what is behind a position cannot matter)."""
    @jax.jit
    def step(adapter, tokens_1xT, last):
        hidden = hidden_states(MODEL, adapter, FROZEN, tokens_1xT, jnp.ones_like(tokens_1xT))
        return jnp.argmax(token_logits(MODEL, FROZEN, hidden[0, last]))

    return step


def continue_without_cache(step, adapter, prompt, max_new_tokens, eos_ids):
    sequence = list(prompt)
    for _ in range(max_new_tokens):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, :len(sequence)] = sequence
        token = int(step(adapter, tokens, len(sequence) - 1))
        if token in eos_ids:
            break
        sequence.append(token)
    return sequence[len(prompt):]


def as_lists(answers):
    return [a.tolist() for a in answers]


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["base", "adapter"])
@pytest.mark.parametrize("eos_ids", [(), (7,), (2, 11, 19)])
def test_equals_the_loop_without_a_cache(adapter, eos_ids, next_token):
    answers = generate(MODEL, adapter, FROZEN, PROMPTS, max_new_tokens=12, eos_ids=eos_ids, batch_size=3, bucket=8)
    assert as_lists(answers) == [continue_without_cache(next_token, adapter, p, 12, eos_ids) for p in PROMPTS]
    assert all(a.dtype == np.int32 for a in answers)


def test_the_cases_above_see_rows_that_end_early_and_rows_that_do_not():
    lengths = {len(a) for a in generate(MODEL, None, FROZEN, PROMPTS, max_new_tokens=12, eos_ids=(2, 11, 19),
                                        batch_size=3, bucket=8)}
    assert len(lengths) > 2 and 12 in lengths
    assert as_lists(generate(MODEL, None, FROZEN, PROMPTS, max_new_tokens=4, eos_ids=())) != as_lists(
        generate(MODEL, ADAPTER, FROZEN, PROMPTS, max_new_tokens=4, eos_ids=()))


@functools.cache
def alone(sampling):
    return as_lists(generate(MODEL, ADAPTER, FROZEN, MANY, max_new_tokens=12, eos_ids=(7, 11), batch_size=1, bucket=32,
                             sampling=sampling))


@pytest.mark.parametrize("batch_size, sampling", [(7, SAMPLED), *(
    pytest.param(*each, marks=pytest.mark.long) for each in ((7, GREEDY), (40, GREEDY), (40, SAMPLED)))])
def test_rows_that_leave_and_join_change_nothing(batch_size, sampling, monkeypatch):
    """40 prompts whose answers end anywhere: rows are filled again, the batch gets smaller, and its cache shorter."""
    expected, shapes = alone(sampling), []
    original = decoding.decode

    def decode(model, adapter, frozen, shared, eos_ids, rows, cache, **kwargs):
        shapes.append((len(rows.last), cache.size))
        return original(model, adapter, frozen, shared, eos_ids, rows, cache, **kwargs)

    monkeypatch.setattr(decoding, "decode", decode)
    monkeypatch.setattr(MODULE, "BLOCK", 4)
    answers = generate(MODEL, ADAPTER, FROZEN, MANY, max_new_tokens=12, eos_ids=(7, 11), batch_size=batch_size,
                       bucket=32, sampling=sampling)
    assert as_lists(answers) == expected
    assert len({len(a) for a in answers}) > 4 and max(len(a) for a in answers) == 12
    assert shapes[0] == (batch_size, 64) and shapes[-1][1] == 32, "the longest prompt's room is not kept for the others"
    assert shapes == sorted(shapes, reverse=True) and len(set(shapes)) <= 5
    if batch_size == 7:
        assert len(shapes) < 3 * -(-40 // 7), "no waiting for a whole batch to end"
    else:
        assert len(shapes) == 3 and shapes[-1][0] in (8, 16, 32), "12 tokens in blocks of 4, the last for few rows"


# Lengths that no other test uses: a function compiled earlier would not be traced.
@pytest.mark.parametrize("adapter, backend, common", [(None, "cpu", 16), (ADAPTER, "cpu", 17), (ADAPTER, "gpu", 18)])
def test_what_all_prompts_begin_with_is_read_once(adapter, backend, common, monkeypatch, next_token):
    """On accelerators layers are stacked."""
    begin = np.random.default_rng(99).integers(0, 23, common).astype(np.int32)
    lengths, original = [], decoding.extend_cache
    monkeypatch.setattr(decoding, "extend_cache", lambda *a: (lengths.append(a[3].shape), original(*a))[1])
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    prompts = [np.concatenate([begin, prompt[:7]]) for prompt in MANY[:7]]
    answers = generate(MODEL, adapter, FROZEN, prompts, max_new_tokens=13, eos_ids=(7,), batch_size=3, bucket=7)
    assert as_lists(answers) == [continue_without_cache(next_token, adapter, p, 13, (7,)) for p in prompts]
    assert set(lengths) == {(1, common), (1, 7), (3, 1)}


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 20))
def test_length_of_what_all_prompts_begin_with(tails, common):
    prompts = [[2] * common + tail for tail in tails]
    found = MODULE._shared_length([np.array(prompt) for prompt in prompts])
    if found:
        assert all(prompt[:found] == prompts[0][:found] and len(prompt) > found for prompt in prompts)
        assert len(prompts) > 1 and found >= MODULE._SHARED_LEAST
        longer = {tuple(prompt[:found + 1]) for prompt in prompts}
        assert len(longer) > 1 or min(map(len, prompts)) == found + 1, "more could be shared"
    else:
        assert len(prompts) == 1 or common < MODULE._SHARED_LEAST


@pytest.mark.parametrize("sampling", [pytest.param(GREEDY, marks=pytest.mark.long), SAMPLED])
def test_batches_side_by_side(sampling, monkeypatch):
    expected, workers = alone(sampling), []
    original = MODULE._answer

    def answer(steps, prompts, waiting, batch_size, *args):
        workers.append((threading.current_thread(), len(waiting), batch_size))
        return original(steps, prompts, waiting, batch_size, *args)

    monkeypatch.setattr(MODULE, "_answer", answer)
    monkeypatch.setattr(MODULE, "_num_workers", lambda batch_size: 3)
    answers = generate(MODEL, ADAPTER, FROZEN, MANY, max_new_tokens=12, eos_ids=(7, 11), batch_size=10, bucket=32,
                       sampling=sampling)
    assert as_lists(answers) == expected
    assert {thread for thread, _, _ in workers}.isdisjoint({threading.main_thread()})
    assert sorted(counts for _, *counts in workers) == [[13, 4], [13, 4], [14, 4]]


def test_batches_side_by_side_are_of_the_callers_precision(monkeypatch):
    monkeypatch.setattr(MODULE, "_num_workers", lambda batch_size: 2)
    found = []
    original = decoding.token_logits
    monkeypatch.setattr(decoding, "token_logits", lambda *a: (found.append(original(*a)), found[-1])[1])
    with jax.enable_x64(True):
        model, frozen = MODEL.clone(dtype=jnp.float64), jax.tree.map(lambda x: x.astype(jnp.float64), FROZEN)
        generate(model, None, frozen, PROMPTS, max_new_tokens=2, eos_ids=(), batch_size=4)
    assert found and all(logits.dtype == jnp.float64 for logits in found)


def test_batches_side_by_side_stop_together(monkeypatch):
    """One finds logits that are not finite: what the other has still to do is not done."""
    monkeypatch.setattr(MODULE, "_num_workers", lambda batch_size: 2)
    frozen = {**FROZEN, "embed_tokens": FROZEN["embed_tokens"].at[22].set(jnp.nan)}
    good, bad = np.array([1, 2], np.int32), np.array([22, 22, 22], np.int32)
    model = Llama(LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": False}))
    frozen["lm_head"] = FROZEN["embed_tokens"].T
    blocks, original = [], MODULE._answer

    def answer(*args):
        for block in original(*args):
            time.sleep(0.05)
            blocks.append(block)
            yield block

    monkeypatch.setattr(MODULE, "_answer", answer)
    monkeypatch.setattr(MODULE, "BLOCK", 1)
    with pytest.raises(FloatingPointError, match="prompt 3: the model's logits are not finite"):
        generate(model, None, frozen, [good, good, good, bad], max_new_tokens=60, eos_ids=(), batch_size=4)
    assert len(blocks) < 30, "of 59"


@pytest.mark.parametrize("backend, cores, batch_size, workers", [
    ("gpu", 8, 512, 1), ("cpu", 8, 512, 8), ("cpu", 2, 512, 2), ("cpu", 8, 128, 2), ("cpu", 8, 127, 1),
    ("cpu", 8, 1, 1)])
def test_as_many_batches_as_cores(backend, cores, batch_size, workers, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert MODULE._num_workers(batch_size) == workers


def test_draws_depend_on_seed_prompt_and_position():
    same = [PROMPTS[3]] * 3

    def draw(prompts=same, seed=1):
        return as_lists(generate(MODEL, None, FROZEN, prompts, max_new_tokens=6, eos_ids=(),
                                 sampling=Sampling(2.0, seed=seed)))

    first = draw()
    assert first == draw() and len({tuple(a) for a in first}) == 3
    compiled = decoding.decode._cache_size(), decoding.admit._cache_size()
    assert draw(seed=2) != first and draw(seed=2**32 - 1) != draw(seed=2**31)
    assert (decoding.decode._cache_size(), decoding.admit._cache_size()) == compiled, "seeds share one program"
    assert draw(same[:1]) == first[:1]


@settings(max_examples=12)
@given(st.data())
@pytest.mark.long
def test_a_prompt_alone_and_in_any_batch(data):
    rows = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6))
    batch_size, bucket = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([8, 16]))
    together = generate(MODEL, ADAPTER, FROZEN, [PROMPTS[i] for i in rows], max_new_tokens=6, eos_ids=(7, 11),
                        batch_size=batch_size, bucket=bucket)
    alone = [generate(MODEL, ADAPTER, FROZEN, [PROMPTS[i]], max_new_tokens=6, eos_ids=(7, 11), bucket=16)[0]
             for i in rows]
    assert as_lists(together) == as_lists(alone)


def test_rows_that_end_at_once():
    first = [a[0] for a in generate(MODEL, None, FROZEN, PROMPTS, max_new_tokens=1, eos_ids=())]
    answers = generate(MODEL, None, FROZEN, PROMPTS, max_new_tokens=5, eos_ids=tuple({int(t) for t in first}))
    assert as_lists(answers) == [[]] * len(PROMPTS)
    some = generate(MODEL, None, FROZEN, PROMPTS, max_new_tokens=5, eos_ids=(int(first[0]),))
    assert some[0].size == 0 and max(a.size for a in some) > 0


def test_one_new_token(next_token):
    answers = generate(MODEL, None, FROZEN, PROMPTS, max_new_tokens=1, eos_ids=(), bucket=8)
    assert as_lists(answers) == [continue_without_cache(next_token, None, p, 1, ()) for p in PROMPTS]


def test_prompt_of_exactly_a_bucket_and_answer_up_to_the_last_position(next_token):
    prompt = np.arange(16, dtype=np.int64) % 23
    answer, = generate(MODEL, None, FROZEN, [prompt], max_new_tokens=48, eos_ids=(), bucket=16)
    assert answer.tolist() == continue_without_cache(next_token, None, prompt, 48, ())


def test_the_loop_stops_when_every_row_has_ended(monkeypatch):
    steps = []
    original = decoding.extend_cache

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1), ordered=True)
        return original(*args)

    monkeypatch.setattr(decoding, "extend_cache", counted)
    # Sizes that no other test uses: a function compiled earlier would not be traced with the counter.
    prompts, joins = PROMPTS[:3], 3
    free = generate(MODEL, None, FROZEN, prompts, max_new_tokens=21, eos_ids=(), batch_size=3, bucket=6)
    jax.effects_barrier()
    assert len(steps) == joins + 20
    steps.clear()
    eos = tuple({int(a[1]) for a in free})
    answers = generate(MODEL, None, FROZEN, prompts, max_new_tokens=21, eos_ids=eos, batch_size=3, bucket=6)
    jax.effects_barrier()
    assert max(a.size for a in answers) <= 1 and len(steps) <= joins + 1


def test_one_compile_per_bucket(monkeypatch):
    traces = []
    original = decoding.extend_cache
    monkeypatch.setattr(decoding, "extend_cache", lambda *a: (traces.append(a[3].shape), original(*a))[1])
    prompts = [p[:n] for n in (1, 2, 3, 4, 5, 9, 10) for p in (np.arange(10, dtype=np.int32),)]
    for eos in ((3,), (4,), (5,)):
        generate(MODEL, None, FROZEN, prompts, max_new_tokens=12, eos_ids=eos, batch_size=2, bucket=5)
    prefills = [shape for shape in traces if shape[1] != 1]
    assert sorted(prefills) == [(1, 5), (1, 10)], "once per bucket"
    assert len(traces) == 3, "and one step for all"


def test_never_materialises_logits_of_the_prompt():
    def admit(ids, lengths):
        rows, cache = decoding.empty(MODEL, batch=2, capacity=50, max_new_tokens=3)
        return decoding.admit(MODEL, None, FROZEN, (), np.array([7]), rows, cache, ids, lengths, lengths, lengths,
                              sampling=GREEDY)

    program = str(jax.make_jaxpr(admit)(np.zeros((2, 40), np.int32), np.ones(2, np.int32)))
    assert "[2,23]" in program and "[2,40,23]" not in program


def test_half_precision_and_remat_of_the_caller(next_token):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), FROZEN)
    model = MODEL.clone(dtype=jnp.bfloat16, remat="dots")
    answers = generate(model, ADAPTER, half, PROMPTS[:2], max_new_tokens=3, eos_ids=())
    assert [a.size for a in answers] == [3, 3]
    merged = generate(MODEL.clone(lora=None), None, merge_adapter(MODEL, ADAPTER, FROZEN), PROMPTS, max_new_tokens=6,
                      eos_ids=())
    assert as_lists(merged) == [continue_without_cache(next_token, ADAPTER, p, 6, ()) for p in PROMPTS]


def test_no_prompts():
    assert generate(MODEL, None, FROZEN, [], max_new_tokens=3, eos_ids=()) == []


def test_progress_bar_counts_prompts_and_tokens(capsys):
    generate(MODEL, None, FROZEN, PROMPTS, max_new_tokens=2, eos_ids=(), batch_size=3, bucket=16, progress=True)
    shown = capsys.readouterr().err
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in shown and "tokens/s" in shown
    generate(MODEL, None, FROZEN, PROMPTS[:1], max_new_tokens=2, eos_ids=(), bucket=16)
    assert capsys.readouterr().err == ""


OK = np.array([1, 2], np.int32)


@pytest.mark.parametrize("prompts, changes, message", [
    ([OK, np.empty(0, np.int32)], {}, r"prompt 1: found shape \(0,\).*at least one token"),
    ([OK[None]], {}, r"prompt 0: found shape \(1, 2\)"),
    ([OK.astype(np.float32)], {}, "prompt 0: found dtype float32, expected integer"),
    ([OK, OK, np.ones(61, np.int32)], {}, r"prompt 2: found 61 tokens \+ 4 new ones.*max_position_embeddings 64"),
    ([np.array([1, 23])], {}, "prompt 0: found token id 23, expected 0 <= id < vocab_size 23"),
    ([np.array([-1, 3])], {}, "prompt 0: found token id -1"),
    ([OK], {"eos_ids": (23,)}, "eos_ids: found 23"),
    ([OK], {"eos_ids": (None,)}, "eos_ids: found None"),
    ([OK], {"max_new_tokens": 0}, "max_new_tokens: found 0"),
    ([OK], {"batch_size": 0}, "batch_size: found 0"),
    ([OK], {"bucket": 0}, "bucket: found 0"),
])
def test_bad_input_is_an_error_before_anything_runs(prompts, changes, message, monkeypatch):
    for name in ("empty", "admit", "decode", "read_shared", "unrolled"):
        monkeypatch.setattr(decoding, name, lambda *a, **k: pytest.fail("ran"))
    with pytest.raises(ValueError, match=message):
        generate(MODEL, None, FROZEN, prompts, **{"max_new_tokens": 4, "eos_ids": (0,), **changes})


def test_logits_that_are_not_finite():
    broken = {**FROZEN, "norm": {"scale": FROZEN["norm"]["scale"] * jnp.nan}}
    with pytest.raises(FloatingPointError, match=r"prompt 6: the model's logits are not finite after 0 tokens"):
        generate(MODEL, None, broken, PROMPTS, max_new_tokens=4, eos_ids=())


def test_stacked_layers_as_on_accelerators(monkeypatch, next_token):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(MODULE, "BLOCK", 5)
    answers = generate(MODEL, ADAPTER, FROZEN, PROMPTS, max_new_tokens=12, eos_ids=(7,), batch_size=5, bucket=8)
    assert as_lists(answers) == [continue_without_cache(next_token, ADAPTER, p, 12, (7,)) for p in PROMPTS]


@pytest.mark.long
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_p=0.95, seed=1)], ids=["greedy", "sampled"])
def test_smollm2_alone_and_in_a_batch(sampling):
    directory = smollm2.fetch()
    model, frozen = load_model(directory)
    tokenizer = load_tokenizer(directory)
    examples = load_examples("embedded_benign@test[0:4]") + load_examples("embedded_sentiment@test[0:4]")
    prompts = encode_prompts(tokenizer, examples)
    alone, together = (as_lists(generate(
        model, None, frozen, prompts, max_new_tokens=24, eos_ids=(tokenizer.eos_token_id,), batch_size=batch_size,
        bucket=16, sampling=sampling)) for batch_size in (1, 8))
    assert alone == together and len({tuple(a) for a in alone}) > 4


@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers(tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = Llama(LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": tied}))
    torch.manual_seed(5)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **model.config.to_hugging_face(), initializer_range=0.5)).eval()
    state = {name: p.detach().numpy() for name, p in theirs.state_dict().items()}

    def stacked(name, transpose=False):
        return np.stack([state[f"model.layers.{i}.{name}.weight"].T if transpose else
                         state[f"model.layers.{i}.{name}.weight"] for i in range(CONFIG.num_layers)])

    def kernels(block, names):
        return {name: {"kernel": stacked(f"{block}.{name}", transpose=True)} for name in names}

    frozen = {
        "embed_tokens": state["model.embed_tokens.weight"], "norm": {"scale": state["model.norm.weight"]},
        "layers": {"attention_norm": {"scale": stacked("input_layernorm")},
                   "mlp_norm": {"scale": stacked("post_attention_layernorm")},
                   "attention": kernels("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
                   "mlp": kernels("mlp", ("gate_proj", "up_proj", "down_proj"))},
        **({} if tied else {"lm_head": state["lm_head.weight"].T}),
    }
    eos_ids = (4, 9)
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            out = theirs.generate(torch.tensor(prompt[None].astype(np.int64)), max_new_tokens=20, do_sample=False,
                                  eos_token_id=list(eos_ids), pad_token_id=0,
                                  attention_mask=torch.ones(1, prompt.size, dtype=torch.long))
        out = out[0, prompt.size:].tolist()
        expected.append(out[:-1] if out[-1] in eos_ids else out)
    answers = generate(model, None, frozen, PROMPTS, max_new_tokens=20, eos_ids=eos_ids, batch_size=4, bucket=8)
    assert as_lists(answers) == expected
    assert len({tuple(a) for a in expected}) > 3 and any(len(set(a)) > 4 for a in expected)
