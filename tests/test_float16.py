"""Weights in float16: read as bfloat16, for nothing scales a loss; and how good a small loss's gradients then are."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxvaccine import losses
from jaxvaccine.checkpoints.hugging_face import load_model, loaded_dtype, save_model
from jaxvaccine.experiment.attack_config import AttackedModel
from jaxvaccine.experiment.config import FieldError, make
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.parts import ModelPart
from jaxvaccine.llama import hidden_states
from tests import tiny
from tests.checkpoints.tiny import edit_tensors

pytestmark = pytest.mark.usefixtures("quick_compile")

MODEL = tiny.model(remat="none", config=dataclasses.replace(tiny.CONFIG, num_layers=2))
# What these few tokens are of a mean over a batch of thousands.
SHARE = 1e-3


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, adapter, frozen, batch):
    """(loss, its gradient), computed as a row's share of a batch; sums in float32."""
    def share(adapter):
        loss = losses.causal_lm_loss(model)(adapter, frozen, batch)[0]
        return SHARE * loss, loss

    grads, loss = jax.grad(share, has_aux=True)(adapter)
    return loss, jax.tree.map(lambda g: g / SHARE, grads)


def cast(frozen, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), frozen)


@functools.cache
def confident(target):
    """(adapter, float32 weights that float16 holds, batch, largest logit) of that loss, in nats a token.

    Every label is what the model predicts, and the logits are scaled up.
    """
    adapter, frozen = tiny.trees(MODEL)
    batch = tiny.batch()
    hidden = jax.jit(hidden_states, static_argnums=0)(
        MODEL, adapter, frozen, batch["input_ids"], batch["attention_mask"])
    logits = np.asarray(hidden @ frozen["lm_head"], np.float64)[:, :-1]
    gaps = np.diff(np.sort(logits)[..., -2:])[..., 0]
    chosen = (gaps > gaps.max() / 2) & (batch["attention_mask"][:, 1:] > 0)
    labels = np.full_like(batch["labels"], -100)
    labels[:, 1:][chosen] = logits.argmax(-1)[chosen]

    def loss(factor):
        z = factor * (logits - logits.max(-1, keepdims=True))[chosen]
        return np.log(np.exp(z).sum(-1)).mean()

    low, high = 1.0, 1e4
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if loss(middle) > target else (low, middle)
    frozen = cast(cast({**frozen, "lm_head": frozen["lm_head"] * high}, jnp.float16), jnp.float32)
    return adapter, frozen, {**batch, "labels": labels}, high * np.abs(logits[chosen]).max()


@pytest.mark.parametrize("target", [pytest.param(1e-2, marks=pytest.mark.long), 1e-4])
def test_gradients_of_a_small_loss(tmp_path, target):
    """In bfloat16 a logit z is off by up to 2^-8 |z|, and so, relative to itself, is the probability that makes a
    gradient: with the weights' own rounding, less than twice that. In float16 it vanishes."""
    adapter, frozen, batch, largest = confident(target)
    expected_loss, expected = gradient(MODEL, adapter, frozen, batch)
    assert float(expected_loss) == pytest.approx(target, rel=0.05)
    save_model(MODEL.clone(lora=None, dtype=np.float16), cast(frozen, jnp.float16), tmp_path / "half")
    model, read = load_model(tmp_path / "half", lora=MODEL.lora, remat="none")
    _, found = gradient(model, adapter, read, batch)
    assert tiny.relative_difference(found, expected) < 2 * largest * 2**-8
    _, halves = gradient(MODEL.clone(dtype=np.float16), adapter, cast(frozen, jnp.float16), batch)
    assert target > 1e-3 or tiny.relative_difference(halves, expected) > 0.5


def test_a_float16_file_is_read_as_bfloat16(tmp_path, caplog):
    _, frozen = tiny.trees(MODEL)
    save_model(MODEL.clone(lora=None, dtype=np.float16), cast(frozen, jnp.float16), tmp_path / "half")
    with caplog.at_level(logging.WARNING):
        model, read = load_model(tmp_path / "half")
    assert f"{tmp_path / 'half'}: found float16 weights, read as bfloat16" in caplog.text
    assert model.dtype == jnp.bfloat16 and loaded_dtype(tmp_path / "half") == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, read, cast(cast(frozen, jnp.float16), jnp.bfloat16))
    caplog.clear()
    for dtype in ("float16", "float32"):  # what is asked for, for inference or to be merged
        model, read = load_model(tmp_path / "half", dtype=dtype)
        assert jnp.dtype(model.dtype).name == dtype == loaded_dtype(tmp_path / "half", dtype)
        jax.tree.map(np.testing.assert_array_equal, read, cast(cast(frozen, jnp.float16), dtype))
    assert not caplog.text


@pytest.mark.parametrize(("other", "expected"), [
    (np.float32, "float32"), (ml_dtypes.bfloat16, "float32"), (None, "bfloat16")])
def test_a_file_of_several_types(tmp_path, other, expected):
    """float16 and bfloat16 have no common type but float32."""
    _, frozen = tiny.trees(MODEL)
    save_model(MODEL.clone(lora=None, dtype=np.float16), cast(frozen, jnp.float16), tmp_path / "half")
    if other:
        edit_tensors(tmp_path / "half/model.safetensors",
                     lambda of: {**of, "model.norm.weight": of["model.norm.weight"].astype(other)})
    assert loaded_dtype(tmp_path / "half") == expected == jnp.dtype(load_model(tmp_path / "half")[0].dtype).name


def test_training_in_float16_is_refused_before_anything_is_loaded():
    for of_stage, name in ((ModelPart, "model"), (AttackedModel, "aligned")):
        with pytest.raises(FieldError, match=r"^dtype: found 'float16', expected one of checkpoint, float32, bfloat16"):
            make(of_stage, {name: "m", "dtype": "float16"})
    make(EvaluateConfig, {"model": "m", "run_dir": "r", "dtype": "float16", "harmful_test": "world_harmful@test"})
