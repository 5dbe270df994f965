"""Tokenizers with chat templates of the sorts that instruct models come with: the templates are ours, and short."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.data.tokenizers_for_tests import LLAMA3_WORDS, TEXTS

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

# Headers with a role, content trimmed, BOS before the first.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
# ChatML with a system prompt of its own, no BOS, content as it is.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of use.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# A system prompt goes into the last question, roles alternate, an answer ends with EOS and has no header.
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set said, turns = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set said, turns = '', messages %}{% endif %}{{ bos_token }}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles take turns, user first') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.last or (loop.index == turns | length - 1) %}"
    "{% if said %}{{ said }}\n\n{% endif %}{% endif %}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}")
# The assistant is called model, and a system prompt is refused.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


@dataclasses.dataclass(frozen=True)
class Kind:
    """special: BOS, or "" , EOS, then others; ends: names of all that ends an answer."""

    template: str
    special: tuple[str, ...]
    ends: tuple[str, ...]
    metaspace: bool = False
    takes_system: bool = True

    def marked(self) -> str:
        """The template with {% generation %} around what the assistant says and its end of turn."""
        content = {LLAMA3: "{{ m['content'] | trim }}<|eot_id|>", QWEN: "{{ m['content'] }}<|im_end|>",
                   GEMMA: "{{ m['content'] | trim }}<end_of_turn>",
                   MISTRAL: " {{ m['content'] | trim }}{{ eos_token }}"}[self.template]
        own = "{% generation %}" + content + "{% endgeneration %}"
        if self.template != MISTRAL:  # there the branch is the assistant's
            own = "{% if m['role'] == 'assistant' %}" + own + "{% else %}" + content + "{% endif %}"
        return self.template.replace(content, own)


KINDS = {
    "llama3": Kind(LLAMA3, ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
                            "<|end_header_id|>"), ("<|end_of_text|>", "<|eot_id|>")),
    "qwen2": Kind(QWEN, ("", "<|im_end|>", "<|endoftext|>", "<|im_start|>"), ("<|im_end|>", "<|endoftext|>")),
    "mistral": Kind(MISTRAL, ("<s>", "</s>", "<unk>"), ("</s>",), metaspace=True),
    "gemma2": Kind(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<eos>", "<end_of_turn>"),
                   takes_system=False),
}


def save_tokenizer(kind: str, path: Path, template: str | None = None, texts: Sequence[str] = ()) -> Path:
    """A directory with tokenizer.json, its config with a template, and a generation_config.json with all EOS ids.

    The post-processor puts BOS in front, where there is one: it would stand there twice if a template's text got it.
    """
    of = KINDS[kind]
    bos, special = of.special[0], [token for token in of.special if token]
    spaced = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    by_byte = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    letters = sorted({c for text in (*TEXTS, *texts, *map(chr, range(32, 127)), "\n") for c in text})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>" if of.metaspace else None))
    tokenizer.pre_tokenizer = spaced if of.metaspace else by_byte
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first") if of.metaspace else (
        tokenizers.decoders.ByteLevel())
    tokenizer.train_from_iterator([*TEXTS, *texts] * 2, tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False,
        initial_alphabet=letters if of.metaspace else tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=of.special[1],
        chat_template=of.template if template is None else template,
        **({"bos_token": bos} if bos else {}), **({"unk_token": "<unk>"} if of.metaspace else {}))
    fast.save_pretrained(path)
    ids = [tokenizer.token_to_id(token) for token in of.ends]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return path
