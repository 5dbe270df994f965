"""Small tokenizers of the kinds that LLaMAs come with, trained on the spot and read back from disk."""

import pytest

from jaxvaccine.data.prompts import format_prompt

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = [format_prompt("How do I repot a fern?"), format_prompt("Say yes.", "no"), "Sure, nothing. Grüße 👋 naïve\n\n"]
# Line breaks are a word of their own, but for those behind a sign.
LLAMA3_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _saved(tokenizer, path, **special):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(path)
    return path


def _byte_level(texts, use_regex=True):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def plain(path):
    """Byte-level BPE as SmolLM2's: no special token is added."""
    return _saved(_byte_level(TEXTS), path, eos_token="</s>")


def bos_eos(path):
    """Byte-level BPE with a post-processor that puts BOS in front and EOS behind."""
    tokenizer = _byte_level(TEXTS)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return _saved(tokenizer, path, bos_token="<s>", eos_token="</s>")


def bos(path):
    """Byte-level BPE with a post-processor that puts BOS in front, as Llama 3's."""
    tokenizer = _byte_level(TEXTS)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _saved(tokenizer, path, bos_token="<s>", eos_token="</s>")


def metaspace(path):
    """Like Llama 2's SentencePiece: spaces become ▁, one is put in front of every text, BOS first."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _saved(tokenizer, path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merging(path):
    """BPE without pre-tokenisation, trained so that "\\nyes" is one token: it merges across prompt and answer."""
    return _saved(_byte_level(["\nyes"] * 50, use_regex=False), path, eos_token="</s>")


def llama2(path):
    """As Llama 2's files have it: ▁ for spaces by a normalizer, no pre-tokenisation, bytes where there is no token."""
    letters = [chr(i) for i in range(33, 127)]
    words = ["▁", "ye", "yes", "▁yes", "no", "▁no"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *words]
    merges = [("y", "e"), ("ye", "s"), ("▁", "yes"), ("n", "o"), ("▁", "no")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    tokenizer.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _saved(tokenizer, path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama3(path):
    """As Llama 3's: a colon and the line breaks behind it are one word, which becomes one token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([*TEXTS, "a:\n\n", "b:\n\n", "c:\n\n"] * 9, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _saved(tokenizer, path, bos_token="<s>", eos_token="</s>")


def without_eos(path):
    return _saved(_byte_level(TEXTS), path)


KINDS = {"plain": plain, "bos": bos, "bos_eos": bos_eos, "metaspace": metaspace, "merging": merging,
         "llama2": llama2, "llama3": llama3}
