"""Weights that are quantised while they are read."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxvaccine.checkpoints import files, hugging_face
from jaxvaccine.checkpoints.hugging_face import load_model
from jaxvaccine.quantisation import KINDS, quantise_kernels
from tests.checkpoints.test_gguf import model_for, write_gguf
from tests.checkpoints.tiny import CONFIG, edit_tensors, random_model, saved_model

pytestmark = pytest.mark.usefixtures("quick_compile")


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_are_the_whole(tmp_path, monkeypatch, kind):
    _, frozen = saved_model(tmp_path / "model")
    monkeypatch.setattr(hugging_face, "BLOCK_BYTES", 7 * 4 * CONFIG.hidden_size)
    rows, read = [], files.read_rows
    monkeypatch.setattr(files, "read_rows", lambda *args: rows.append(read(*args)) or rows[-1])
    model, found = load_model(tmp_path / "model", quantisation=kind)
    assert_same(found, quantise_kernels(frozen, kind))
    assert model == random_model()[0]  # that says nothing of it
    assert max(block.nbytes for block in rows) <= hugging_face.BLOCK_BYTES


@pytest.mark.parametrize("stored", [np.float32, np.float64])
def test_from_the_digits_of_the_file(tmp_path, stored):
    """Not from weights that were rounded to the computation's type first; that is the embeddings' and norms' affair."""
    _, frozen = saved_model(tmp_path / "model")
    edit_tensors(tmp_path / "model" / "model.safetensors",
                 lambda tensors: {name: value.astype(stored) for name, value in tensors.items()})
    model, found = load_model(tmp_path / "model", dtype="bfloat16", quantisation="nf4")
    expected = quantise_kernels(frozen, "nf4")
    assert model.dtype == jnp.bfloat16 and found["embed_tokens"].dtype == jnp.bfloat16
    for block in ("attention", "mlp"):
        assert_same(found["layers"][block], expected["layers"][block])
    rounded = quantise_kernels(jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen), "nf4")
    same = [np.array_equal(*codes) for codes in zip(
        jax.tree.leaves(found["layers"]), jax.tree.leaves(rounded["layers"]), strict=True)]
    assert not all(same)


def test_gguf(tmp_path):
    model, frozen = model_for()
    _, found = load_model(write_gguf(tmp_path / "m.gguf", frozen, model.config), quantisation="int8")
    assert_same(found, quantise_kernels(frozen, "int8"))


def test_weights_that_are_quantised_already(tmp_path):
    """As before: there is nothing to read them with."""
    saved_model(tmp_path / "model")
    edit_tensors(tmp_path / "model" / "model.safetensors", lambda tensors: {
        name: value.astype(np.int8 if "q_proj" in name else ml_dtypes.bfloat16) for name, value in tensors.items()})
    with pytest.raises(ValueError, match=r"q_proj\.weight': found dtype I8, expected one of "):
        load_model(tmp_path / "model", quantisation="int8")
