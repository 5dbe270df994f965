"""What generation remembers of each row: keys and values of all layers, in caches that attention reads one by one.

One type, `Cache`, with two implementations that differ in where the layers are and in which axis is the last:
`Stacked` for layers that a scan walks through, on accelerators, and `Unrolled` for layers apart, on CPUs.

Shapes in names: L layers, B rows, G rows that are replaced, T tokens of new rows, K key-value heads, H head_dim,
S slots, one for each token.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jaxvaccine.llama_config import LlamaConfig


class KeyValues(NamedTuple):
    """Keys (rotated) and values as attention multiplies them: of one layer k [B, K, H, S] and v [B, K, S, H].

    Of all layers: k [L, B, K, H, S], v [L, B, K, S, H], or of an unrolled model tuples of L arrays each.
    """

    k: Any
    v: Any


class Cache(Protocol):
    """Slots of B rows, or of one that all rows share, of which the first lengths[b] count.

    Nothing is changed in place; in a jitted function that was given its cache, XLA does so.
    """

    lengths: jax.Array  # [B] int32

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, size: int, dtype) -> "Cache":
        """`size` slots of each of `batch` rows, of which none counts."""
        ...

    @classmethod
    def of(cls, new: KeyValues, lengths_B) -> "Cache":
        """Keys and values of all layers as a cache of as many slots, of which the first lengths[b] count."""
        ...

    @property
    def size(self) -> int:
        """S."""
        ...

    def read(self, layer) -> KeyValues:
        """Keys and values of one layer, a view: k [B, K, H, S], v [B, K, S, H]."""
        ...

    def append(self, new: "Cache", at=None) -> "Cache":
        """The slots of `new` behind what each row holds, over what lies there; its lengths are added.

        at: the slot from which all rows are written, where it is one and the same.
        """
        ...

    def replace(self, rows_G, new: "Cache") -> "Cache":
        """The rows of `new`, of at most as many slots, in the place of the rows given; numbers beyond the last drop."""
        ...

    def keep(self, rows_B, size: int) -> "Cache":
        """The rows given, with their first `size` slots."""
        ...


def _write(old, new, at, row: int, slot: int):
    """`new` over `old` from slot `at` on, of each row its own if at is [B]; row, slot: which axes these are."""
    if jnp.ndim(at) == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, new, at, slot)

    def write(old, new, at):
        return jax.lax.dynamic_update_slice_in_dim(old, new, at, slot - 1)  # without the axis of the rows

    return jax.vmap(write, (row, row, 0), row)(old, new, at)


class Stacked(NamedTuple):
    """All layers in one array, keys and values each with the axis last over which attention sums.

    So XLA's GPU backend reads them where one query meets each head's keys, and no layer may lie otherwise: it would
    turn the whole cache around before it reads it, and hold it twice.
    """

    k: jax.Array  # [L, B, K, S, H]
    v: jax.Array  # [L, B, K, H, S]
    lengths: jax.Array

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, size: int, dtype) -> "Stacked":
        rows, head_dim = (config.num_layers, batch, config.num_kv_heads), config.head_dim
        return cls(jnp.zeros((*rows, size, head_dim), dtype), jnp.zeros((*rows, head_dim, size), dtype),
                   jnp.zeros(batch, jnp.int32))

    @classmethod
    def of(cls, new: KeyValues, lengths_B) -> "Stacked":
        return cls(new.k.swapaxes(3, 4), new.v.swapaxes(3, 4), lengths_B)

    @property
    def size(self) -> int:
        return self.k.shape[3]

    def read(self, layer) -> KeyValues:
        k_BxKxSxH, v_BxKxHxS = (
            with_layout_constraint(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), Layout((0, 1, 2, 3)))
            for x in (self.k, self.v))
        return KeyValues(k_BxKxSxH.swapaxes(2, 3), v_BxKxHxS.swapaxes(2, 3))

    def append(self, new: "Stacked", at=None) -> "Stacked":
        start = self.lengths if at is None else at
        return Stacked(_write(self.k, new.k, start, row=1, slot=3), _write(self.v, new.v, start, row=1, slot=4),
                       self.lengths + new.lengths)

    def replace(self, rows_G, new: "Stacked") -> "Stacked":
        return Stacked(self.k.at[:, rows_G, :, :new.size].set(new.k, mode="drop"),
                       self.v.at[:, rows_G, :, :, :new.size].set(new.v, mode="drop"),
                       self.lengths.at[rows_G].set(new.lengths, mode="drop"))

    def keep(self, rows_B, size: int) -> "Stacked":
        return Stacked(self.k[:, rows_B, :, :size], self.v[:, rows_B, :, :, :size], self.lengths[rows_B])

    def unrolled(self) -> "Unrolled":
        layers = [self.read(layer) for layer in range(len(self.k))]
        return Unrolled(*zip(*layers, strict=True), self.lengths)


class Unrolled(NamedTuple):
    """An array for each layer, lying as attention reads it: for products in another order, XLA's CPU backend takes
    three times as long, and it copies each slice of a stacked array.
    """

    k: tuple[jax.Array, ...]  # L of [B, K, H, S]
    v: tuple[jax.Array, ...]  # L of [B, K, S, H]
    lengths: jax.Array

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, size: int, dtype) -> "Unrolled":
        rows, layers = (batch, config.num_kv_heads), range(config.num_layers)
        return cls(tuple(jnp.zeros((*rows, config.head_dim, size), dtype) for _ in layers),
                   tuple(jnp.zeros((*rows, size, config.head_dim), dtype) for _ in layers), jnp.zeros(batch, jnp.int32))

    @classmethod
    def of(cls, new: KeyValues, lengths_B) -> "Unrolled":
        return cls(tuple(new.k), tuple(new.v), lengths_B)

    @property
    def size(self) -> int:
        return self.k[0].shape[3]

    def read(self, layer: int) -> KeyValues:
        return KeyValues(self.k[layer], self.v[layer])

    def append(self, new: "Unrolled", at=None) -> "Unrolled":
        start = self.lengths if at is None else at
        return Unrolled(jax.tree.map(lambda old, new: _write(old, new, start, row=0, slot=3), self.k, new.k),
                        jax.tree.map(lambda old, new: _write(old, new, start, row=0, slot=2), self.v, new.v),
                        self.lengths + new.lengths)

    def replace(self, rows_G, new: "Unrolled") -> "Unrolled":
        size = new.size
        return Unrolled(
            jax.tree.map(lambda old, new: old.at[rows_G, :, :, :size].set(new, mode="drop"), self.k, new.k),
            jax.tree.map(lambda old, new: old.at[rows_G, :, :size].set(new, mode="drop"), self.v, new.v),
            self.lengths.at[rows_G].set(new.lengths, mode="drop"))

    def keep(self, rows_B, size: int) -> "Unrolled":
        return Unrolled(jax.tree.map(lambda k: k[rows_B, :, :, :size], self.k),
                        jax.tree.map(lambda v: v[rows_B, :, :size], self.v), self.lengths[rows_B])
