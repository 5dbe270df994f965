"""What a model and its adapter look like, as data: read from and written to Hugging Face's config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on any subset of the seven projections of every layer.

    Attributes:
      rank: inner dimension r of A [in, r] and B [r, out].
      alpha: the adapter's output is scaled by alpha / rank.
      dropout: probability in [0, 1) with which an input feature of the adapter is dropped in training.
      targets: which of TARGETS carry an adapter.
    """

    rank: int = 8
    alpha: float = 4.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"LoraConfig.rank: found {self.rank}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig.dropout: found {self.dropout}, expected 0 <= dropout < 1")
        unknown = sorted(set(self.targets) - set(TARGETS))
        if unknown or not self.targets:
            raise ValueError(f"LoraConfig.targets: found {unknown or 'none'}, expected some of {', '.join(TARGETS)}")
        # One order, whatever the caller's, so that equal adapters have equal configs; a tuple, so that it hashes.
        object.__setattr__(self, "targets", tuple(t for t in TARGETS if t in self.targets))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's rescaling of the rotary frequencies, lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of one model_type have in common. What is left out is as in LLaMA.

    Attributes:
      architecture: transformers' class.
      activation: of the MLP's gate, by transformers' name.
      qkv_biases: queries, keys and values have biases.
      offset_norms: norms multiply by 1 + scale and then round; LLaMA's round and then multiply by scale.
      post_norms: the outputs of attention and MLP are normalised too, before they are added to the residual.
      scaled_embeddings: embeddings are multiplied by √D, which is rounded to the model's dtype.
      options: the fields of LlamaConfig, None in LLaMA, that may be set.
      fixed: by field of config.json, the values that are supported.
      defaults: by field of config.json, what transformers takes if it is left out.
    """

    architecture: str
    activation: str = "silu"
    qkv_biases: bool = False
    offset_norms: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False
    options: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SCALARS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
OPTIONS = ("sliding_window", "sliding_layers", *SCALARS)
FULL, SLIDING = "full_attention", "sliding_attention"
NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", fixed={**NO_BIAS, "hidden_act": ("silu", None), "sliding_window": (None,)}),
    "mistral": Family(
        "MistralForCausalLM", options=OPTIONS[:1], fixed={**NO_BIAS, "hidden_act": ("silu",)},
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "qwen2": Family(
        "Qwen2ForCausalLM", qkv_biases=True, options=OPTIONS[:2], fixed={"hidden_act": ("silu",)},
        defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
                  "num_key_value_heads": 32, "max_position_embeddings": 32768}),
    "gemma2": Family(
        "Gemma2ForCausalLM", activation="gelu_pytorch_tanh", offset_norms=True, post_norms=True,
        scaled_embeddings=True, options=OPTIONS,
        fixed={**NO_BIAS, "hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False, None)},
        defaults={"sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
                  "final_logit_softcapping": 30.0, "head_dim": 256, "num_key_value_heads": 4,
                  "max_position_embeddings": 8192, "tie_word_embeddings": True}),
}
NAMES = " or ".join(", ".join(map(repr, FAMILIES)).rsplit(", ", 1))


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The fields of a config.json that change what is computed, under Hugging Face's meaning.

    Attributes:
      model_type: one of FAMILIES, which says which of the fields below may be set.
      sliding_window: how many positions a query sees, its own included, in the layers that have a window.
      sliding_layers: which layers have it, [L]; None: all.
      query_pre_attn_scalar: products of queries and keys are divided by its square root; None: by that of head_dim.
      attn_logit_softcapping: the scores s become c tanh(s / c), c being this.
      final_logit_softcapping: the same for next-token logits.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self):
        def fail(field, expected):
            raise ValueError(f"LlamaConfig.{field}: found {getattr(self, field)!r}, expected {expected}")

        if self.num_heads % self.num_kv_heads:
            fail("num_kv_heads", f"a divisor of num_heads {self.num_heads}")
        if self.head_dim % 2:
            fail("head_dim", "an even number (rotary halves)")
        if self.model_type not in FAMILIES:
            fail("model_type", NAMES)
        # What computes the same is equal.
        if self.query_pre_attn_scalar == self.head_dim:
            object.__setattr__(self, "query_pre_attn_scalar", None)
        if self.sliding_layers is not None:
            if len(self.sliding_layers) != self.num_layers:
                fail("sliding_layers", f"one value for each of num_layers {self.num_layers}")
            if self.sliding_window is None:
                fail("sliding_layers", "None without a sliding_window")
            object.__setattr__(self, "sliding_layers", None if all(self.sliding_layers) else tuple(self.sliding_layers))
        for field in OPTIONS:
            value = getattr(self, field)
            if value is not None and field not in self.family.options:
                fail(field, f"None for model_type {self.model_type!r}")
            if value is not None and field != "sliding_layers" and not value > 0:
                fail(field, "a number above 0")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Which layers have a sliding window, [L]."""
        return self.sliding_layers or (self.sliding_window is not None,) * self.num_layers

    @property
    def attention_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @classmethod
    def from_hugging_face(cls, fields: Mapping[str, Any], source: str = "config.json") -> Self:
        """Reads config.json's fields, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Raises:
          ValueError: a field is missing or asks for something not computed here; names source, field, found, expected.
        """
        def fail(field, expected):
            raise ValueError(f"{source}: field {field!r}: found {fields[field]!r}, expected {expected}")

        def require(field):
            if fields.get(field) is None:
                raise ValueError(f"{source}: field {field!r} is missing")
            return fields[field]

        def count(field, default=None):
            value = require(field) if default is None or fields.get(field) is not None else default
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                fail(field, "an integer of at least 1")
            return value

        def scalar(field):
            value = fields[field]
            if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
                fail(field, "a number above 0")
            return value

        if require("model_type") not in FAMILIES:
            fail("model_type", f"{NAMES}: not supported")
        family = FAMILIES[fields["model_type"]]
        fields = {**family.defaults, **fields}
        supported = {**family.fixed, "partial_rotary_factor": (1.0, None), "quantization_config": (None,)}
        for field, values in supported.items():
            if field in fields and fields[field] not in values:
                fail(field, f"{values[0]!r}: not supported")
        rope = {"rope_theta": fields.get("rope_theta"), **(fields.get("rope_scaling") or {}),
                **(fields.get("rope_parameters") or {})}
        num_heads, hidden_size = count("num_attention_heads"), count("hidden_size")
        num_layers = count("num_hidden_layers")
        window, layers = _read_windows(fields, num_layers, source)
        return cls(
            vocab_size=count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=count("num_key_value_heads", num_heads),
            head_dim=count("head_dim", hidden_size // num_heads),
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope["rope_theta"] or 10000.0),
            rope_scaling=_read_rope_scaling(rope, source),
            max_position_embeddings=count("max_position_embeddings", 2048),
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
            model_type=fields["model_type"],
            sliding_window=window,
            sliding_layers=layers,
            **{field: scalar(field) for field in SCALARS if field in family.options},
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """The fields of a config.json that transformers 4 and 5 both read."""
        scaling = self.rope_scaling and {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        windows = {"sliding_window": self.sliding_window,
                   "layer_types": [SLIDING if local else FULL for local in self.local_layers]}
        own = {
            "llama": {"attention_bias": False, "mlp_bias": False},
            "mistral": {"sliding_window": self.sliding_window},
            # Before layer_types there was the number of layers, from the first on, that have no window.
            "qwen2": {**windows, "use_sliding_window": self.sliding_window is not None,
                      "max_window_layers": [*self.local_layers, True].index(True)},
            "gemma2": {**windows, "hidden_activation": self.family.activation, "attention_bias": False,
                       **{field: getattr(self, field) for field in SCALARS},
                       "query_pre_attn_scalar": self.query_pre_attn_scalar or self.head_dim},
        }
        return {
            "architectures": [self.family.architecture], "model_type": self.model_type,
            "hidden_act": self.family.activation,
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size, "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim, "rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta,
            "rope_scaling": scaling, "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings, **own[self.model_type],
        }


def _read_windows(fields: Mapping[str, Any], num_layers: int, source: str
                  ) -> tuple[int | None, tuple[bool, ...] | None]:
    """sliding_window and sliding_layers: by layer_types or, where a config.json has none, by its family's rule."""
    def fail(field, found, expected):
        raise ValueError(f"{source}: field {field!r}: found {found!r}, expected {expected}")

    def check(field, value, least):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            fail(field, value, f"an integer of at least {least}")

    model_type, window, given = fields["model_type"], fields.get("sliding_window"), fields.get("layer_types")
    if model_type == "qwen2" and not fields["use_sliding_window"]:
        window = None
    if window is not None:
        check("sliding_window", window, 1)
    first_local = num_layers if window is None else 0
    if model_type == "qwen2" and window is not None and given is None:
        first_local = fields["max_window_layers"]
        check("max_window_layers", first_local, 0)
    types = [SLIDING if i >= first_local else FULL for i in range(num_layers)]
    if model_type == "gemma2":
        types = [FULL if i % 2 else SLIDING for i in range(num_layers)]
    if given is not None:
        known = isinstance(given, list) and all(kind in (FULL, SLIDING) for kind in given)
        if not known or len(given) != num_layers:
            fail("layer_types", given, f"{FULL!r} or {SLIDING!r} for each of {num_layers} layers: not supported")
        if "sliding_layers" not in FAMILIES[model_type].options and given != types:
            fail("layer_types", given, f"{types[0]!r} for all layers: not supported")
        types = given
    if window is None and SLIDING in types:
        fail("sliding_window", window, f"an integer of at least 1, for the layers of {SLIDING!r}")
    return window, None if window is None else tuple(kind == SLIDING for kind in types)


def _read_rope_scaling(rope: Mapping[str, Any], source: str) -> Llama3RopeScaling | None:
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"{source}: field 'partial_rotary_factor': found {rope['partial_rotary_factor']!r}, "
                         "expected 1.0: not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{source}: field 'rope_scaling': found type {kind!r}, expected 'llama3': not supported")
    names = [field.name for field in dataclasses.fields(Llama3RopeScaling)]
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(f"{source}: field 'rope_scaling': {', '.join(missing)} missing")
    return Llama3RopeScaling(**{name: rope[name] for name in names})
