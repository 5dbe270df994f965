"""Both caches beside lists of tokens, and what they cost in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.cache import KeyValues, Stacked, Unrolled
from jaxvaccine.evaluation import decoding
from jaxvaccine.evaluation.sampling import GREEDY
from jaxvaccine.llama import Llama, tree_shapes, unroll_layers
from tests import tiny

CONFIG = tiny.CONFIG
LAYERS, HEADS, SIZE = CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim
KINDS = [Stacked, Unrolled]


def tokens(rng, batch, length):
    """Keys and values [L, B, K, T, H] of new tokens, and the same as a model gives them."""
    k, v = rng.normal(size=(2, LAYERS, batch, HEADS, length, SIZE)).astype(np.float32)
    return (k, v), KeyValues(jnp.asarray(k.swapaxes(3, 4)), jnp.asarray(v))


@functools.partial(jax.jit, static_argnames="layer")
def layer_of(cache, layer):
    return cache.read(layer)


def check(cache, rows):
    """rows: of each row the tokens that count, (k, v) [L, K, T, H]."""
    assert cache.lengths.tolist() == [k.shape[2] for k, _ in rows]
    for layer in range(LAYERS):
        read = layer_of(cache, layer)
        assert read.k.shape == (len(rows), HEADS, SIZE, cache.size)
        assert read.v.shape == (len(rows), HEADS, cache.size, SIZE)
        for row, (k, v) in enumerate(rows):
            length = k.shape[2]
            np.testing.assert_array_equal(read.k[row, :, :, :length].swapaxes(1, 2), k[layer])
            np.testing.assert_array_equal(read.v[row, :, :length], v[layer])


def first(of, row, length):
    return tuple(x[:, row, :, :length] for x in of)


def joined(a, b):
    return tuple(np.concatenate(pair, axis=2) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.lists(st.integers(0, 2), min_size=3, max_size=3),
       st.integers(0, 2**32 - 1))
def test_rows_are_lists_of_tokens(kind, lengths, more, seed):
    """Rows that begin with some tokens, go on with others behind, are replaced, and left out."""
    rng = np.random.default_rng(seed)
    cache = kind.empty(CONFIG, 3, 8, jnp.float32)
    check(cache, [first(tokens(rng, 3, 1)[0], row, 0) for row in range(3)])
    expected, new = tokens(rng, 3, 3)
    rows = [first(expected, row, length) for row, length in enumerate(lengths)]
    cache = cache.append(kind.of(new, jnp.array(lengths)))
    check(cache, rows)
    expected, new = tokens(rng, 3, 2)
    rows = [joined(of, first(expected, row, length)) for row, (of, length) in enumerate(zip(rows, more, strict=True))]
    cache = cache.append(kind.of(new, jnp.array(more)))
    check(cache, rows)
    expected, new = tokens(rng, 2, 4)
    cache = cache.replace(jnp.array([1, 3]), kind.of(new, jnp.array([2, 4])))  # there is no row 3
    rows[1] = first(expected, 0, 2)
    check(cache, rows)
    check(cache.keep(jnp.array([2, 1]), 5), [rows[2], rows[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_slot_in_all_rows(kind):
    rng = np.random.default_rng(0)
    cache = kind.empty(CONFIG, 2, 3, jnp.float32)
    rows = [first(tokens(rng, 2, 1)[0], row, 0) for row in range(2)]
    append = jax.jit(lambda cache, new, step: cache.append(new, at=step))
    for step in range(3):
        expected, new = tokens(rng, 2, 1)
        cache = append(cache, kind.of(new, jnp.ones(2, jnp.int32)), step)
        rows = [joined(of, first(expected, row, 1)) for row, of in enumerate(rows)]
        check(cache, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_room_writes_over_its_own(kind):
    """As a row does whose answer ends within a block: the other keeps what it has."""
    rng = np.random.default_rng(0)
    expected, new = tokens(rng, 2, 4)
    cache = kind.of(new, jnp.array([1, 4]))
    more, new = tokens(rng, 2, 2)
    found = cache.append(kind.of(new, jnp.array([2, 0])))
    check(found._replace(lengths=jnp.array([3, 2])), [joined(first(expected, 0, 1), first(more, 0, 2)),
                                                      first(expected, 1, 2)])


def test_layers_apart_are_the_same():
    expected, new = tokens(np.random.default_rng(0), 3, 4)
    lengths = jnp.array([4, 0, 2])
    check(Stacked.of(new, lengths).unrolled(), [first(expected, row, length) for row, length in enumerate((4, 0, 2))])


def test_layers_of_a_stack_are_read_as_they_lie():
    """Of the layout that a layer's slice must have, XLA's GPU backend once chose another, and copied the cache."""
    cache = jax.eval_shape(lambda: Stacked.empty(CONFIG, 5, 7, jnp.float32))
    program = jax.jit(lambda cache, layer: cache.read(layer)).lower(cache, 0).as_text()
    layouts = [line for line in program.splitlines() if "LayoutConstraint" in line]
    assert len(layouts) == 2 and all("dense<[3, 2, 1, 0]>" in line for line in layouts)


def test_decoding_copies_no_cache_of_layers_apart():
    """Reading it for a block of tokens, and appending them."""
    model = Llama(CONFIG, remat="none")
    unrolled = model.clone(unroll=True)
    frozen = jax.eval_shape(functools.partial(unroll_layers, unrolled), tree_shapes(model)["params"])
    rows, cache = jax.eval_shape(lambda: decoding.empty(unrolled, batch=8, capacity=2048, max_new_tokens=10))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    eos_ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = decoding.decode.lower(unrolled, None, frozen, (), eos_ids, rows, cache, steps=8,
                                   sampling=GREEDY).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2
