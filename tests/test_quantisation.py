"""int8 and NF4 against numpy, written from the papers, and what rounding may do at most."""

import statistics

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine import quantisation
from jaxvaccine.memory import tree_bytes
from jaxvaccine.quantisation import Int8, Nf4, dequantise, quantise

# Less than a block, whole ones, and one that is not; few, since each compiles anew.
SIZES = st.sampled_from([(2, 3), (64, 1), (130, 5)])
EXPONENTS = st.integers(-20, 20)


def drawn(shape, exponent=0, seed=0, zeros=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * (rng.random(shape) >= zeros) * 2.0**exponent).astype(np.float32)


def test_levels():
    """Quantiles of the standard normal distribution: eight on its positive side, seven on the other, turned round, and
    zero; over the largest (arXiv 2305.14314, section 3, with the offset of the authors' code)."""
    def quantiles(count):
        return [statistics.NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, count)[:-1]]

    levels = np.sort([*quantiles(9), 0.0, *(-q for q in quantiles(8))])
    # The published ones are those of the other sign.
    np.testing.assert_allclose(quantisation.NF4_LEVELS, np.sort(levels / np.abs(levels).max()), atol=2e-7)


def reference_nf4(kernel):
    """[in, out] as PyTorch has it, [out, in], in blocks of 64 of each row: absmax, then the nearest level."""
    levels, found = np.array(quantisation.NF4_LEVELS), np.empty(kernel.T.shape)
    for row, weights in zip(found, kernel.T.astype(np.float64), strict=True):
        for start in range(0, len(weights), 64):
            block = weights[start:start + 64]
            absmax = float(np.abs(block).max().astype(ml_dtypes.bfloat16))
            nearest = np.abs(block[:, None] / (absmax or 1.0) - levels).argmin(axis=1)
            row[start:start + 64] = levels[nearest] * absmax
    return found.T


@settings(max_examples=40)
@given(SIZES, EXPONENTS, st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0]))
def test_nf4_is_the_papers(shape, exponent, seed, zeros):
    kernel = drawn(shape, exponent, seed, zeros)
    found, expected = np.asarray(quantise(kernel, "nf4").dequantise(jnp.float32)), reference_nf4(kernel)
    assert found.shape == shape
    # Halfway between two levels, either is as good.
    np.testing.assert_allclose(np.abs(found - kernel), np.abs(expected - kernel), rtol=1e-5, atol=1e-6 * 2.0**exponent)
    assert np.mean(np.abs(found - expected) > 1e-5 * np.abs(expected)) <= 0.01


@settings(max_examples=40)
@given(st.sampled_from([(1, 2), (130, 5)]), EXPONENTS, st.integers(0, 5), st.sampled_from([0.0, 1.0]))
def test_int8_is_off_by_half_a_step(shape, exponent, seed, zeros):
    kernel = drawn(shape, exponent, seed, zeros)
    found = quantise(kernel, "int8")
    step = np.abs(kernel).max(axis=0) / 127
    np.testing.assert_allclose(found.scale[0], step, rtol=1e-6)
    assert (np.abs(found.dequantise(jnp.float32) - kernel) <= step * (0.5 + 1e-4)).all()
    assert (np.abs(np.asarray(found.values, int)).max(axis=0) == 127 * (step > 0)).all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@settings(max_examples=20)
@given(shape=SIZES, exponent=EXPONENTS, seed=st.integers(0, 5))
def test_what_is_quantised_stays_what_it_is(kind, shape, exponent, seed):
    once = quantise(drawn(shape, exponent, seed), kind)
    again = quantise(once.dequantise(jnp.float32), kind)
    np.testing.assert_array_equal(again[0], once[0])
    np.testing.assert_allclose(np.asarray(again.scale, float), np.asarray(once.scale, float), rtol=1e-6)


@pytest.mark.parametrize("kind, error", [("int8", 0.01), ("nf4", 0.1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_on_normal_weights(kind, error, dtype):
    """‖W − Ŵ‖ / ‖W‖, which is stated in docs/methods.md; bfloat16 adds its own rounding, 0.2%."""
    kernel = drawn((4096, 8))
    found = np.asarray(quantise(kernel, kind).dequantise(dtype), np.float64)
    relative = np.sqrt(np.mean((found - kernel) ** 2) / np.mean(kernel.astype(np.float64) ** 2))
    assert 0.7 * error < relative < error


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_stacked_and_in_rows(kind):
    """Layers one by one, and outputs in blocks, are the whole: so loading takes blocks."""
    kernel = drawn((3, 130, 6))
    whole = quantise(kernel, kind)
    by_layer = jax.tree.map(lambda *parts: jnp.stack(parts), *(quantise(layer, kind) for layer in kernel))
    by_output = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1),
                             *(quantise(kernel[..., start:start + 4], kind) for start in (0, 4)))
    for other in (by_layer, by_output):
        jax.tree.map(np.testing.assert_array_equal, other, whole)


def test_bytes_are_those_of_bitsandbytes():
    """Of two inputs the first is in the upper half; codes count the levels from below."""
    found = quantise(np.array([[1.0, 0.0], [-1.0, 2.0]], np.float32), "nf4")
    assert found.codes.tolist() == [[0xF0, 0x7F]] and found.scale.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("kind, bits", [("int8", 8 + 32 / 4096), ("nf4", 4.25)])
def test_bits(kind, bits):
    shape = jax.eval_shape(lambda kernel: quantise(kernel, kind), jax.ShapeDtypeStruct((2, 4096, 11), jnp.bfloat16))
    assert 8 * tree_bytes(shape) == bits * 2 * 4096 * 11


def test_kernels_alone():
    tree = {"embed_tokens": jnp.ones((4, 2)), "layers": {"mlp": {"up_proj": {
        "kernel": jnp.ones((3, 4, 2)), "bias": jnp.ones((3, 2))}}}}
    found = quantisation.quantise_kernels(tree, "nf4")
    site = found["layers"]["mlp"]["up_proj"]
    assert isinstance(site["kernel"], Nf4) and site["bias"] is tree["layers"]["mlp"]["up_proj"]["bias"]
    assert found["embed_tokens"] is tree["embed_tokens"]
    assert quantisation.is_quantised(found) and not quantisation.is_quantised(tree)
    jax.tree.map(np.testing.assert_array_equal, quantisation.dequantise_kernels(found, jnp.float32), tree)
    assert quantisation.quantise_kernels(tree, "none") == tree and dequantise(tree, jnp.float32) is tree
    assert isinstance(quantise(jnp.ones((3, 2)), "int8"), Int8)


def test_errors():
    with pytest.raises(ValueError, match="quantisation: found 'int4', expected one of none, int8, nf4"):
        quantise(jnp.ones((2, 2)), "int4")
    with pytest.raises(ValueError, match="nf4: a kernel's inputs: found 3, expected an even number"):
        quantise(jnp.ones((3, 2)), "nf4")
