"""The table of tensor names: what Hugging Face calls each weight of a model, and where it lies in our tree."""

from typing import NamedTuple

from jaxvaccine.llama_config import LlamaConfig


class Site(NamedTuple):
    """Where a Hugging Face tensor lies in our tree: its leaf's path, layer, and whether the matrix is transposed."""

    path: tuple[str, ...]
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]  # Hugging Face's


def tensor_sites(config: LlamaConfig) -> dict[str, Site]:
    """Every tensor of the model, by its Hugging Face name."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * head, config.num_kv_heads * head
    matrices = {
        "self_attn.q_proj": ("attention", (query, hidden)), "self_attn.k_proj": ("attention", (key, hidden)),
        "self_attn.v_proj": ("attention", (key, hidden)), "self_attn.o_proj": ("attention", (hidden, query)),
        "mlp.gate_proj": ("mlp", (inner, hidden)), "mlp.up_proj": ("mlp", (inner, hidden)),
        "mlp.down_proj": ("mlp", (hidden, inner)),
    }
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.family.post_norms:
        norms |= {"post_attention_layernorm": "attention_post_norm", "pre_feedforward_layernorm": "mlp_norm",
                  "post_feedforward_layernorm": "mlp_post_norm"}
    vocabulary = (config.vocab_size, hidden)
    sites = {"model.embed_tokens.weight": Site(("embed_tokens",), None, False, vocabulary)}
    if not config.tie_word_embeddings:
        sites["lm_head.weight"] = Site(("lm_head",), None, True, vocabulary)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for name, norm in norms.items():
            sites[f"{prefix}.{name}.weight"] = Site(("layers", norm, "scale"), layer, False, (hidden,))
        for name, (block, shape) in matrices.items():
            path = ("layers", block, name.split(".")[1])
            sites[f"{prefix}.{name}.weight"] = Site((*path, "kernel"), layer, True, shape)
            if config.family.qkv_biases and path[-1] in ("q_proj", "k_proj", "v_proj"):
                sites[f"{prefix}.{name}.bias"] = Site((*path, "bias"), layer, False, shape[:1])
    sites["model.norm.weight"] = Site(("norm", "scale"), None, False, (hidden,))
    return sites
