"""LLaMA and its relatives as a pure function of four trees: frozen weights, LoRA adapter, perturbations and batch.

The trees are Linen collections: ``params`` (frozen base), ``lora`` (what trains), ``perturbations`` (added to each
attention block's output, zero unless a defense writes them; with ``slots`` those of some layers). Layers are stacked on
axis 0 of every leaf by ``nn.scan`` and rematerialised by ``nn.remat``. Where Mistral, Qwen2 and Gemma2 differ,
`LlamaConfig.family` says so.
Flax is known in this file alone; everything else calls the functions at its end.

Shapes in names: B batch, T sequence, S slots of keys, D hidden size, N query heads, K key-value heads, H head_dim,
V vocabulary, L layers, r LoRA rank.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvaccine.attention import (
    attend,
    attend_by_cudnn,
    attend_to_cache,
    attention_masks,
    cudnn_lacks,
    rope_table,
    rotate,
    slot_positions,
    soft_cap,
)
from jaxvaccine.cache import Cache, KeyValues, Stacked, Unrolled
from jaxvaccine.conventions import at_least_float32
from jaxvaccine.llama_config import LlamaConfig, LoraConfig
from jaxvaccine.perturbations import add, collections
from jaxvaccine.products import einsum_in_full
from jaxvaccine.quantisation import Quantised, dequantise

Remat = Literal["none", "dots", "full"]
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Activations(NamedTuple):
    """What a model computes on the way, in the base's dtype."""

    inputs: jax.Array  # [L, B, T, D], of every layer: the embeddings, then the residual stream, not normed
    mlp: jax.Array  # [L, B, T, D], of every MLP: its output, before the residual add (and before Gemma2's norm of it)
    final: jax.Array  # [B, T, D], after the last norm


def perturb(module: nn.Module, name: str, x):
    """x with what the collections have for this site of the module."""
    if not module.has_variable("perturbations", name):
        return x
    slots = module.get_variable("slots", name) if module.has_variable("slots", name) else None
    return add(x, module.get_variable("perturbations", name), slots)


def _low_rank(x, a, b, scale: float = 1.0):
    """scale · x A B. In two dimensions A's and B's gradients are plain matrix products; contracted over batch and
    position apart, XLA's CPU backend takes three times as long for them."""
    return (scale * (x.reshape(-1, x.shape[-1]) @ a.astype(x.dtype)) @ b.astype(x.dtype)).reshape(*x.shape[:-1], -1)


class LoraDense(nn.Module):
    """y = x W + (alpha / rank) · dropout(x) A B, arXiv 2106.09685 eq. 3; A Kaiming-uniform (a = √5), B zero, as PEFT.

    The kernel W is [in, out] in the base's dtype, or `Quantised`; A [in, r] and B [r, out] are at least float32 and are
    cast to the base's dtype for the computation. Dropout applies when a ``dropout`` rng is passed. With a bias y is
    x W + bias + …; where `merging.freeze_adapter` has put an update, x W + x A0 B0 + ….
    """

    features: int
    dtype: Any
    lora: LoraConfig | None
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        kernel = self.get_variable("params", "kernel")
        quantised = isinstance(kernel, Quantised)
        if not quantised:
            kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype) if self.use_bias else None

        def product(x, kernel):
            kernel = dequantise(kernel, self.dtype)
            if bias is None:
                return jnp.matmul(x, kernel)
            # PyTorch rounds once, after the bias.
            return (einsum_in_full("BTI,IO->BTO", x, kernel) + bias).astype(self.dtype)

        # Whatever the layer keeps, weights in floats are not among it.
        y = (jax.checkpoint(product) if quantised else product)(x, kernel)
        if self.has_variable("params", "update"):
            y = y + _low_rank(x, *self.get_variable("params", "update"))
        if self.lora is None or self.name not in self.lora.targets:
            return y
        a_shape, b_shape = (x.shape[-1], self.lora.rank), (self.lora.rank, self.features)
        adapter_dtype, bound = at_least_float32(self.dtype), 1 / np.sqrt(x.shape[-1])
        a = self.variable("lora", "a", lambda: jax.random.uniform(
            self.make_rng("params"), a_shape, adapter_dtype, -bound, bound)).value
        b = self.variable("lora", "b", jnp.zeros, b_shape, adapter_dtype).value
        if self.lora.dropout and self.has_rng("dropout"):
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.lora.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.lora.dropout), 0).astype(x.dtype)
        return y + _low_rank(x, a, b, self.lora.scale)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, or with ``offset`` · (1 + scale); the two round where transformers' LLaMA and Gemma2 do."""

    epsilon: float
    dtype: Any
    offset: bool = False

    @nn.compact
    def __call__(self, x):
        initial = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", initial, (x.shape[-1],), self.dtype)
        x = x.astype(at_least_float32(self.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        if self.offset:
            return (x * (1 + scale.astype(x.dtype))).astype(self.dtype)
        return scale * x.astype(self.dtype)


def _norm_of(config: LlamaConfig, dtype):
    return functools.partial(RMSNorm, config.rms_norm_eps, dtype, config.family.offset_norms)


class Attention(nn.Module):
    config: LlamaConfig
    lora: LoraConfig | None
    dtype: Any
    by_cudnn: bool = False  # in the mask's place are then the rows' lengths

    @nn.compact
    def __call__(self, x_BxTxD, rope, mask_BxTxS, cached: Sequence[KeyValues]):
        config = self.config
        batch, length, _ = x_BxTxD.shape
        dense = functools.partial(LoraDense, dtype=self.dtype, lora=self.lora)

        def heads(name, count):
            projected = dense(count * config.head_dim, use_bias=config.family.qkv_biases, name=name)(x_BxTxD)
            return projected.reshape(batch, length, count, config.head_dim)

        q_BxTxNxH = rotate(heads("q_proj", config.num_heads), rope)
        k_BxTxKxH = rotate(heads("k_proj", config.num_kv_heads), rope)
        v_BxTxKxH = heads("v_proj", config.num_kv_heads)
        new = KeyValues(k_BxTxKxH.transpose(0, 2, 3, 1), v_BxTxKxH.transpose(0, 2, 1, 3))
        if cached:
            out = attend_to_cache(config, q_BxTxNxH, new, cached, mask_BxTxS)
        elif self.by_cudnn:
            out = attend_by_cudnn(config, q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, mask_BxTxS)
        else:
            out = attend(config, q_BxTxNxH, k_BxTxKxH, v_BxTxKxH, mask_BxTxS)
        out = dense(config.hidden_size, name="o_proj")(out.reshape(batch, length, config.num_heads * config.head_dim))
        return perturb(self, "output", out), new


def _gelu(x):
    """GELU by tanh. In float32, as in PyTorch: in float16 x³ is infinite above 40, and the derivative NaN."""
    return jax.nn.gelu(x.astype(at_least_float32(x.dtype)), approximate=True).astype(x.dtype)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": _gelu}


class MLP(nn.Module):
    config: LlamaConfig
    lora: LoraConfig | None
    dtype: Any

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(LoraDense, dtype=self.dtype, lora=self.lora)
        activation = ACTIVATIONS[self.config.family.activation]
        gate = activation(dense(self.config.intermediate_size, name="gate_proj")(x))
        out = dense(self.config.hidden_size, name="down_proj")(
            gate * dense(self.config.intermediate_size, name="up_proj")(x))
        self.sow("intermediates", "output", out)  # kept by `layer_activations` alone
        return out


class Layer(nn.Module):
    config: LlamaConfig
    lora: LoraConfig | None
    dtype: Any
    by_cudnn: bool = False

    @nn.compact
    def __call__(self, x, rope, masks, cache, layer, local):
        self.sow("intermediates", "input", x)
        norm = _norm_of(self.config, self.dtype)

        def post_norm(name, y):
            return norm(name=name)(y) if self.config.family.post_norms else y

        mask = jnp.where(local, masks[1], masks[0]) if len(masks) == 2 else masks[0]
        attention, new = Attention(self.config, self.lora, self.dtype, self.by_cudnn, name="attention")(
            norm(name="attention_norm")(x), rope, mask, [part.read(layer) for part in cache])
        x = x + post_norm("attention_post_norm", attention)
        mlp = MLP(self.config, self.lora, self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        return x + post_norm("mlp_post_norm", mlp), new


class Llama(nn.Module):
    """The architecture: static, hashable, without weights. ``dtype`` is that of the base and of the computation.

    ``unroll`` takes trees of `unroll_layers` and compiles every layer by itself: for generation on a CPU, where a loop
    over stacked layers copies each layer's weights for every token. ``layers_a_turn`` of the loop over layers: more of
    them compile longer, and take a small model less time where nothing is rematerialised. ``microbatch_size``: how many
    rows the losses compute at a time (`microbatches`), 0 is all. ``attention``: by XLA's products or, on a GPU, by
    cuDNN's kernel, whose memory does not grow with the square of T.
    """

    config: LlamaConfig
    lora: LoraConfig | None = None
    dtype: Any = jnp.float32
    remat: Remat = "full"
    unroll: bool = False
    layers_a_turn: int = 1
    microbatch_size: int = 0
    attention: Literal["xla", "cudnn"] = "xla"

    def setup(self):
        config, normal = self.config, nn.initializers.normal(0.02)
        self.embed_tokens = self.param("embed_tokens", normal, (config.vocab_size, config.hidden_size), self.dtype)
        if not config.tie_word_embeddings:
            self.lm_head = self.param("lm_head", normal, (config.hidden_size, config.vocab_size), self.dtype)
        self.norm = _norm_of(config, self.dtype)()
        by_cudnn = self.attention == "cudnn"
        if by_cudnn and (lacking := cudnn_lacks(config, self.dtype)):
            raise ValueError(f"attention: found cudnn, expected xla: it has no {lacking}")
        if self.unroll:
            self.layers = [Layer(config, self.lora, self.dtype, by_cudnn) for _ in range(config.num_layers)]
            return
        # prevent_cse is for unrolled code; inside a scan it only costs time.
        layer = Layer if self.remat == "none" else nn.remat(
            Layer, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        self.layers = nn.scan(
            layer, length=config.num_layers, unroll=self.layers_a_turn,
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
            variable_axes={"params": 0, "lora": 0, "perturbations": 0, "intermediates": 0},
            variable_broadcast="slots",
            split_rngs={"params": True, "dropout": True},
        )(config, self.lora, self.dtype, by_cudnn)

    def __call__(self, input_ids_BxT, attention_mask_BxT, cache: Sequence[Cache] = ()):
        """Final hidden states [B, T, D], after the last norm, and the new keys and values of all layers."""
        positions = slot_positions(cache, *input_ids_BxT.shape)
        rope = rope_table(self.config, positions[-1], self.dtype)
        if self.attention == "cudnn" and not cache:
            masks = (jnp.maximum(attention_mask_BxT.sum(axis=-1, dtype=jnp.int32), 1),)
        else:
            masks = attention_masks(self.config, attention_mask_BxT, cache, positions)
        x_BxTxD = self.embed_tokens[input_ids_BxT]
        if self.config.family.scaled_embeddings:
            x_BxTxD = x_BxTxD * jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        if self.unroll:
            news = []
            for i, layer in enumerate(self.layers):
                x_BxTxD, new = layer(x_BxTxD, rope, masks, cache, i, self.config.local_layers[i])
                news.append(new)
            return self.norm(x_BxTxD), KeyValues(*zip(*news, strict=True))
        # What the scan hands a layer are values: its number, to read the cache, and which of two masks it takes.
        layers_L = jnp.arange(self.config.num_layers) if cache else None
        local_L = jnp.asarray(self.config.local_layers) if len(masks) == 2 else None
        x_BxTxD, new = self.layers(x_BxTxD, rope, masks, cache, layers_L, local_L)
        return self.norm(x_BxTxD), new

    def logits(self, hidden):
        kernel_DxV = self.embed_tokens.T if self.config.tie_word_embeddings else self.lm_head
        return soft_cap(einsum_in_full("...D,DV->...V", hidden, kernel_DxV), self.config.final_logit_softcapping)


def _bind(model: Llama, adapter, frozen, perturbations=None):
    """The module and its collections; without an adapter the module without LoRA sites."""
    variables = {"params": frozen, **collections(perturbations)}
    if not adapter:
        return model.clone(lora=None), variables
    if model.lora is None:
        raise ValueError("found an adapter for a model without LoRA sites, expected Llama(..., lora=LoraConfig(...))")
    return model, {**variables, "lora": adapter}


def hidden_states(model: Llama, adapter, frozen, input_ids_BxT, attention_mask_BxT, *, perturbations=None, key=None):
    """Final hidden states [B, T, D], after the last norm, in the base's dtype.

    Args:
      model: the architecture.
      adapter: LoRA tree, leaves stacked [L, ...]; None for the bare base.
      frozen: base weights, layers stacked [L, ...].
      input_ids_BxT: int32 token ids, right-padded.
      attention_mask_BxT: 1 where a token counts.
      perturbations: tree as of `zero_perturbations`, added to each layer's attention output (after o_proj, before the
        residual add), or `Slots` or `SiteNorms` of such trees; None adds nothing.
      key: PRNG key of LoRA dropout; None turns dropout off.
    """
    model, variables = _bind(model, adapter, frozen, perturbations)
    rngs = None if key is None else {"dropout": key}
    hidden_BxTxD, _ = model.apply(variables, input_ids_BxT, attention_mask_BxT, rngs=rngs)
    return hidden_BxTxD


def layer_activations(model: Llama, adapter, frozen, input_ids_BxT, attention_mask_BxT, *, key=None) -> Activations:
    """What every layer reads and every MLP gives; arguments as of `hidden_states`."""
    model, variables = _bind(model, adapter, frozen)
    (final_BxTxD, _), sown = model.apply(
        variables, input_ids_BxT, attention_mask_BxT, rngs=None if key is None else {"dropout": key},
        mutable=["intermediates"])
    layers = sown["intermediates"]["layers"]
    return Activations(layers["input"][0], layers["mlp"]["output"][0], final_BxTxD)


def cache_type(model: Llama) -> type[Cache]:
    """What this model remembers its tokens in."""
    return Unrolled if model.unroll else Stacked


def extend_cache(model: Llama, adapter, frozen, input_ids_BxT, attention_mask_BxT, cache: Sequence[Cache] = ()):
    """Reads T more tokens of each row, which follow those of the caches, one behind the other.

    Returns final hidden states [B, T, D] and the new tokens' `KeyValues` of all layers.
    """
    model, variables = _bind(model, adapter, frozen)
    return model.apply(variables, input_ids_BxT, attention_mask_BxT, cache)


def unroll_layers(model: Llama, tree):
    """``params`` or ``lora`` with every layer's leaves apart, as an unrolled model takes them."""
    layers = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(model.config.num_layers)}
    return {**{name: child for name, child in tree.items() if name != "layers"}, **layers}


def token_logits(model: Llama, frozen, hidden):
    """Next-token logits [..., V], accumulated in at least float32, of final hidden states [..., D]."""
    return model.apply({"params": frozen}, hidden, method="logits")


def read_out(model: Llama, frozen, hidden):
    """Logits [..., V] of what a layer reads or gives, [..., D]: through the last norm and the output head."""
    return model.apply({"params": frozen}, hidden, method=lambda module, x: module.logits(module.norm(x)))


def _init(model: Llama, key):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.clone(attention="xla").init(key, tokens, jnp.ones_like(tokens))  # here cuDNN need not be


def init_frozen(model: Llama, key):
    """Random base weights (normal, σ 0.02; norms neutral, biases 0) in the model's dtype, layers stacked [L, ...]."""
    return jax.jit(lambda key: _init(model, key)["params"])(key)


def init_adapter(model: Llama, key):
    """A fresh LoRA tree, leaves [L, ...] in at least float32: A Kaiming-uniform with a = √5, B zero (as PEFT).

    Raises:
      ValueError: the model has no LoraConfig.
    """
    if model.lora is None:
        raise ValueError("init_adapter: the model has no LoRA sites; expected Llama(..., lora=LoraConfig(...))")
    return jax.jit(lambda key: _init(model, key)["lora"])(key)


def in_mlp(adapter):
    """Which leaves of an adapter are in an MLP, and not in an attention: a tree of bools like it.

    Raises:
      ValueError: a leaf is in neither or in both.
    """
    def one(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        blocks = {"attention", "mlp"}.intersection(name.split("/"))
        if len(blocks) != 1:
            raise ValueError(f"in_mlp: adapter: found leaf {name!r}, expected one of 'attention' and 'mlp' in its path")
        return "mlp" in blocks

    return jax.tree_util.tree_map_with_path(one, adapter)


def tree_shapes(model: Llama) -> dict[str, Any]:
    """ShapeDtypeStructs of the model's trees: ``params`` and, if it has LoRA sites, ``lora``. Allocates nothing."""
    shapes = jax.eval_shape(lambda key: _init(model, key), jax.ShapeDtypeStruct((2,), jnp.uint32))
    return {name: shapes[name] for name in ("params", "lora") if name in shapes}


def zero_perturbations(model: Llama, batch: int, length: int):
    """Zeros at every perturbation site: one leaf [L, B, T, D] in the base's dtype."""
    config = model.config
    shape = (config.num_layers, batch, length, config.hidden_size)
    return {"layers": {"attention": {"output": jnp.zeros(shape, model.dtype)}}}
