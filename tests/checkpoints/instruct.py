"""Tiny random instruct models, as their families' directories have them: weights, tokenizer, template, EOS ids."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxvaccine import llama, save_model
from jaxvaccine.data import load_tokenizer
from tests import tiny
from tests.data import chat_models

CONFIGS = {"llama3": tiny.CONFIG, **{name: tiny.FAMILIES[name] for name in ("mistral", "qwen2", "gemma2")}}


SCALE = 0.3  # large enough that texts vary


def save_instruct(kind: str, directory: Path, texts: Sequence[str] = (), template: str | None = None) -> Path:
    """A model directory. Only tokens of printable ASCII have logits that are not 0.

    texts: what the tokenizer is trained on besides. template: another than the kind's, "" for none.
    """
    source = chat_models.save_tokenizer(kind, directory / "source", template, texts)
    tokenizer = load_tokenizer(source)
    of = CONFIGS[kind]
    config = dataclasses.replace(of, vocab_size=len(tokenizer), max_position_embeddings=512, num_layers=2,
                                 sliding_layers=of.sliding_layers[:2] if of.sliding_layers else of.sliding_layers)
    model = llama.Llama(config)
    generator = np.random.default_rng(1)
    frozen = jax.tree.map(lambda leaf: SCALE * generator.standard_normal(leaf.shape, np.float32),
                          llama.tree_shapes(model)["params"])
    shown = np.asarray([(text := tokenizer.decode([i])).isascii() and text.isprintable() and text != ""
                        for i in range(len(tokenizer))])
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    frozen = {**frozen, name: frozen[name] * (shown[:, None] if config.tie_word_embeddings else shown)}
    (source / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    return Path(save_model(model, frozen, directory / "model", tokenizer_from=source))
