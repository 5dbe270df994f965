"""What a program takes of a GPU's memory, by a formula: in no time, and where JAX's CUDA plugin is not installed.

Weights, adapter and optimizer are counted, not estimated. The rest is what is live at the worst moment of a pass, as it
was read off XLA's buffer assignment (`memory.program_memory`): the same arrays in other models, other batches and other
lengths, so that the formula is right in each of them. tests/memory_cases.csv has the compiler's figures beside which it
was made and is checked; docs/benchmarks.md says how far the two are apart.

Shapes in names: B rows, T positions, D hidden size, F intermediate size, N query heads, K key-value heads, H head_dim,
V vocabulary, L layers, S slots of the cache.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvaccine import llama
from jaxvaccine.memory import tree_bytes
from jaxvaccine.quantisation import Kind, quantise_kernels

LOGITS_BLOCK = 128  # positions whose logits a loss computes at a time
WORKSPACE = 32 * 2**20  # bytes, of cuBLAS: the most that XLA reserves for a product


class Pass(NamedTuple):
    """A pass through the model, forward and back, and what its method holds meanwhile."""

    rows: int
    sites: float = 0  # layers whose [B, T, D] is held beside the layers' inputs: perturbations, their gradients, …
    trees: float = 1  # trees like the adapter, beside the state: gradients
    waiting: int = 0  # rows of a pass before it that goes back after it, and keeps what it needs till then
    perturbed: int = 0  # rows that its sites perturb, which may be more than are computed at a time
    divides: bool = True  # whether a few rows can be computed at a time
    everything: bool = False  # is kept of the layers: a second derivative undoes rematerialisation


class Memory(NamedTuple):
    """Bytes of a program, by what they are; `peak` is what it takes at its worst moment."""

    weights: int
    adapter: int = 0
    optimizer: int = 0  # and a defense's state
    boundaries: int = 0  # what is kept of every layer for the backward pass: its input, or with less remat more
    perturbations: int = 0  # and what else a method holds of layers: gradients at them, hidden states
    gradients: int = 0
    layer: int = 0  # one layer's own work, where it is most
    logits: int = 0  # of a block of positions; when no layer is at work
    cache: int = 0  # of decoding

    @property
    def temporary(self) -> int:
        """What comes and goes within the program."""
        return self.boundaries + self.perturbations + self.gradients + max(self.layer, self.logits)

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.cache + self.temporary


class _Layer(NamedTuple):
    """Bytes of one layer's arrays."""

    x: int  # [B, T, D]
    q: int  # [B, T, N, H]
    kv: int  # [B, T, K, H]
    mlp: int  # [B, T, F]
    scores: int  # [B, N, T, T], in at least float32
    weights: int  # the same in the model's dtype
    seen: int  # the same of bool
    up: int  # [D, F]: the largest kernel
    out: int  # [N H, D]: the kernel of queries, and of the output


def tree_shapes(model: llama.Llama, quantisation: Kind = "none") -> dict[str, Any]:
    """`llama.tree_shapes` of a backbone that is kept so."""
    shapes = llama.tree_shapes(model)
    return shapes | {"params": jax.eval_shape(functools.partial(quantise_kernels, kind=quantisation), shapes["params"])}


@functools.lru_cache(maxsize=64)
def weights(model: llama.Llama, quantisation: Kind = "none") -> tuple[int, int]:
    """Bytes of the weights, and of the adapter: 0 without one."""
    shapes = tree_shapes(model, quantisation)
    return tree_bytes(shapes["params"]), tree_bytes(shapes.get("lora", ()))


def _sizes(model: llama.Llama, rows: int, length: int) -> _Layer:
    c, size = model.config, jnp.dtype(model.dtype).itemsize
    tokens = rows * length
    # cuDNN's kernel holds no scores.
    squares = 0 if model.attention == "cudnn" else tokens * c.num_heads * length
    return _Layer(
        *(size * tokens * width for width in (
            c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size)),
        max(size, 4) * squares, size * squares, squares,
        size * c.hidden_size * c.intermediate_size, size * c.num_heads * c.head_dim * c.hidden_size)


def _layer_work(model: llama.Llama, rows: int, length: int) -> int:
    """What one layer needs beside what is kept of all layers: the worst of four moments.

    Kernels are there twice: XLA copies a layer's out of the stack. Where there are few positions it finds an order in
    which fewer of them are copied at once.
    """
    of, grouped = _sizes(model, rows, length), model.config.num_heads > model.config.num_kv_heads
    kernels = 2 * of.up if model.remat == "full" else of.up  # the backward pass needs less where products are kept
    # What masked scores become, and the mask in their shape: XLA makes both before the loop over layers.
    masks = of.scores + of.seen
    # The scores and their softmax.
    forward = masks + 2 * of.scores + 3 * of.x + of.out + kernels
    # Gemma2: the capped scores beside the others, GELU in float32.
    capped = of.scores if model.config.attn_logit_softcapping else 0
    in_full = of.mlp if model.config.family.activation != "silu" else 0
    # Of the softmax: weights, their gradient and that of the scores.
    attention = 2 * (of.scores + capped) + of.weights + 3 * of.mlp + 5 * of.x + 2 * of.q + 2 * of.kv + 2 * of.out
    # Of the gate: both products, their gradients, and what the last product reads.
    mlp = (of.scores + capped + in_full + (0 if grouped else of.weights) + (6 if grouped else 5) * of.mlp
           + 3 * of.x + 2 * of.q + 2 * of.kv + kernels + of.out)
    # In a small model, a product's workspace.
    product = masks + of.scores + 2 * of.mlp + 3 * of.x + kernels + WORKSPACE
    return max(forward, attention, mlp, product) + sum(_dropped(model, of))


def _dropped(model: llama.Llama, of: _Layer) -> tuple[int, int]:
    """With dropout: the adapters' inputs in a layer, which are no longer those of the kernels, and the random bits of
    the widest."""
    targets = model.lora.targets if model.lora and model.lora.dropout else ()
    widths = {"o_proj": of.q, "down_proj": of.mlp}
    inputs = [widths.get(name, of.x) for name in targets]
    return sum(inputs), max(inputs, default=0) * 4 // jnp.dtype(model.dtype).itemsize


def _kept(model: llama.Llama, rows: int, length: int) -> int:
    """What is kept of every layer for the backward pass."""
    of, config = _sizes(model, rows, length), model.config
    if model.remat == "full":
        return config.num_layers * of.x
    targets = model.lora.targets if model.lora else ()
    outputs = {"q_proj": of.q, "k_proj": of.kv, "v_proj": of.kv, "o_proj": of.x, "gate_proj": of.mlp, "up_proj": of.mlp}
    # Of every product its result, and with an adapter the adapter's too.
    products = sum(size * (2 if name in targets else 1) for name, size in outputs.items())
    if model.remat == "dots":
        return config.num_layers * (of.x + products)
    # Nothing is computed anew: what is multiplied, normed, and every step of softmax and gate.
    float32 = 2 * of.x * max(1, 4 // jnp.dtype(model.dtype).itemsize)
    inputs = 2 * of.x + (of.q if "o_proj" in targets else 0) + _dropped(model, of)[0]
    return config.num_layers * (float32 + inputs + of.q + 2 * of.kv + 5 * of.mlp + 2 * of.scores + of.weights)


def _logits(model: llama.Llama, positions: int) -> int:
    """Logits of so many positions, and their softmax."""
    return 2 * positions * model.config.vocab_size * max(4, jnp.dtype(model.dtype).itemsize)


def step(model: llama.Llama, passes: Sequence[Pass], length: int, state_bytes: int, quantisation: Kind = "none"
         ) -> Memory:
    """Memory of a training step.

    Args:
      model: with the adapter's sites; its dtype and remat count.
      passes: that the step makes one after the other, of the rows that are computed at a time.
      length: T of all batches.
      state_bytes: of the train state: adapter, optimizer and what the defense remembers.
      quantisation: of the backbone.
    """
    base, adapter = weights(model, quantisation)

    def at_sites(one: Pass) -> float:
        """Layers whose [rows, T, D] is held: of perturbations of more rows all, and beside them those of the rows that
        are computed and their gradient."""
        return one.sites * (one.perturbed / one.rows + 2 if one.perturbed > one.rows else 1)

    def of_pass(one: Pass) -> Memory:
        of, keeping = _sizes(model, one.rows, length), model.clone(remat="none") if one.everything else model
        return Memory(
            base, adapter, state_bytes - adapter, _kept(keeping, one.rows + one.waiting, length),
            int(at_sites(one) * of.x), int(one.trees * adapter), _layer_work(model, one.rows, length),
            _logits(model, min(LOGITS_BLOCK, one.rows * length)))

    def between(one: Pass) -> Memory:
        """When gradients at the sites become perturbations: both are there."""
        return Memory(base, adapter, state_bytes - adapter,
                      perturbations=int(2 * one.sites * one.perturbed / one.rows * _sizes(model, one.rows, length).x))

    return max([*map(of_pass, passes), *map(between, passes)], key=lambda memory: memory.peak)


def merge(model: llama.Llama) -> Memory:
    """Memory of merging the adapter into the weights: beside them one kernel's sum, in the adapter's dtype."""
    a_sum = model.config.hidden_size * model.config.intermediate_size * max(4, jnp.dtype(model.dtype).itemsize)
    return Memory(*weights(model), layer=a_sum)


def kept_rows(rows: int, smallest: int) -> int:
    """The most rows that go on in a smaller batch, beside which the cache of all is there for a moment."""
    size = max(smallest, 1 << max(rows // 2 - 1, 0).bit_length())
    # Or all of them, with half of the positions.
    return max(rows // 2, size if size < rows else 1)


def decode(model: llama.Llama, rows: int, positions: int, prompt: int, *, block: int, joining: int, smallest: int,
           quantisation: Kind = "none") -> Memory:
    """Memory of `generate`: of its three programs, which decode a block, read new prompts and drop rows, the largest.

    Args:
      model: with the adapter's sites, if it has one.
      rows: decoded together.
      positions: slots of a row, prompt and answer.
      prompt: padded length of a prompt.
      block: tokens between two looks.
      joining: prompts that are read together.
      smallest: number of rows below which no batch is made smaller.
      quantisation: of the backbone.
    """
    config, of = model.config, _sizes(model, joining, prompt)
    a_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(model.dtype).itemsize
    cache, grouped = rows * positions * a_slot, config.num_heads > config.num_kv_heads
    # Of one query to each head's keys XLA makes no product but a sum, which reads kernels where they were copied.
    kernels = 2 * of.up if grouped else 3 * of.up + 4 * of.out + WORKSPACE
    a_layer = cache // (2 * config.num_layers) if grouped else 0
    scores = 4 * rows * config.num_heads * (positions + block) * max(4, jnp.dtype(model.dtype).itemsize)
    # For a single row the output head is copied to float32, unless that is what it is.
    head = 4 * config.vocab_size * config.hidden_size if jnp.dtype(model.dtype).itemsize < 4 else 0
    recent, new = rows * block * a_slot, joining * prompt * a_slot
    decoding = max(kernels + recent + max(3 * a_layer + scores, _logits(model, rows)),
                   recent + head if rows == 1 else 0)
    # The keys and values of a single prompt are turned around before they are written.
    reading = max(kernels + (3 if joining == 1 else 1) * new
                  + max(3 * of.scores + of.seen + 3 * of.x, _logits(model, joining)),
                  new + head if joining == 1 else 0)
    dropping = cache * kept_rows(rows, smallest) // rows
    return Memory(*weights(model, quantisation), cache=cache, layer=max(decoding, reading, dropping))
