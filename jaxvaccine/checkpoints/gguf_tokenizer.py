"""A GGUF file's tokenizer as Hugging Face's tokenizer.json, built with the `tokenizers` library."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxvaccine.json_files import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Control tokens of these names end an answer in llama.cpp, whatever the metadata names (src/llama-vocab.cpp).
END_NAMES = frozenset((
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<eos>", "<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"))
# tokenizer.ggml.pre: a missing one is taken for GPT-2's, whose model type this is.
GPT2_PRE, SMOLLM_PRE, LLAMA3_PRE = ("gpt-2", "default", None), ("smollm",), ("llama-bpe", "llama3", "llama-v3")
# Llama 3's published tokenizer.json.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def special_token_ids(metadata: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Ids of bos, eos, unk and pad, those that there are."""
    return _named_ids(metadata, SPECIAL, path)


def end_token_ids(metadata: Mapping[str, Any], path: Path) -> list[int]:
    """All tokens that end an answer: eos first, end of turn, end of message, and control tokens of such names."""
    named = _named_ids(metadata, {name: name for name in ("eos", "eot", "eom")}, path)
    by_name = [index for index, (token, kind) in enumerate(zip(
        metadata.get("tokenizer.ggml.tokens") or (), metadata.get("tokenizer.ggml.token_type") or (), strict=False))
        if kind == CONTROL and token in END_NAMES]
    return list(dict.fromkeys([*named.values(), *by_name]))


def _named_ids(metadata: Mapping[str, Any], keys: Mapping[str, str], path: Path) -> dict[str, int]:
    tokens, ids = metadata.get("tokenizer.ggml.tokens") or [], {}
    for name, key in keys.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise ValueError(f"{path}: key 'tokenizer.ggml.{key}_token_id': found {index}, "
                             f"expected an id below {len(tokens)}")
        ids[name] = index
    return ids


def write_tokenizer(metadata: Mapping[str, Any], directory: Path, vocab_size: int, max_length: int,
                    path: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
      metadata: of the GGUF file.
      directory: where to write.
      vocab_size: rows of the embedding, which every id must have.
      max_length: the model's context in tokens.
      path: the GGUF file, for messages.

    Raises:
      ValueError: the tokenizer's kind is not supported, or its tokens, merges, scores or types do not fit together.
    """
    def fail(key, found, expected):
        raise ValueError(f"{path}: key 'tokenizer.{key}': found {found}, expected {expected}")

    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        fail("ggml.model", repr(kind), "'gpt2' or 'llama': not supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens or ())
    if not tokens or len(tokens) > vocab_size:
        fail("ggml.tokens", f"{len(tokens or ())} tokens", f"1 to {vocab_size}, the rows of token_embd.weight")
    if len(types) != len(tokens):
        fail("ggml.token_type", f"{len(types)} types", f"{len(tokens)}, one for each token")
    if len(set(tokens)) != len(tokens):
        fail("ggml.tokens", f"only {len(set(tokens))} different ones", f"{len(tokens)}")
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"tokenizer.ggml.{key}"):
            fail(f"ggml.{key}", "it", "none: not supported")

    ids = special_token_ids(metadata, path)
    names = {name: tokens[index] for name, index in ids.items()}
    build = _byte_level if kind == "gpt2" else _sentence_piece
    tokenizer = build(metadata, tokens, types, names, fail)
    _add_tokens(tokenizer, tokens, types, set(ids.values()))
    # llama.cpp's defaults: Llama 2 and 3 begin with BOS.
    default_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3_PRE
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default_bos)) and "bos" in names
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in names
    _add_template(tokenizer, names, ids, add_bos, add_eos)
    tokenizer.save(str(directory / "tokenizer.json"))

    special = {f"{name}_token": token for name, token in names.items()}
    template = metadata.get("tokenizer.chat_template")
    write_json(directory / "special_tokens_map.json", special)
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", **special, "add_bos_token": add_bos, "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False, "model_max_length": max_length,
        **({"chat_template": template} if template else {}),
    })


def _byte_level(metadata, tokens, types, names, fail) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not merges:
        fail("ggml.merges", "none", "the merges of a byte-level BPE")
    for line, merge in enumerate(merges):
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            fail("ggml.merges", f"{' '.join(merge)!r} at {line}", "two tokens whose concatenation is a token")
    pre = metadata.get("tokenizer.ggml.pre")
    # Llama 3 takes a whole word that is a token before it looks at merges.
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre in LLAMA3_PRE))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, fail)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(pre: str | None, fail) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    if pre in GPT2_PRE:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in SMOLLM_PRE:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre in LLAMA3_PRE:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(str(name) for name in (*GPT2_PRE[:2], *SMOLLM_PRE, *LLAMA3_PRE))
    return fail("ggml.pre", repr(pre), f"one of {known}: not supported")


def _sentence_piece(metadata, tokens, types, names, fail) -> "Tokenizer":
    """SentencePiece's BPE joins the neighbours whose union scores best: merges in the order of scores do the same."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores = metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        fail("ggml.scores", f"{len(scores)} scores", f"{len(tokens)}, one for each token")
    if "unk" not in names:
        fail("ggml.unknown_token_id", "none", "the id of the unknown token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    pieces = sorted((token for token in normal if len(token) > 1), key=lambda token: -scores[vocabulary[token]])
    if len({scores[vocabulary[piece]] for piece in pieces}) != len(pieces):
        fail("ggml.scores", "pieces of equal scores", "scores that order the merges: not supported")
    merges = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted((split for split in splits if normal.issuperset(split)),
                         key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=names["unk"], fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _add_tokens(tokenizer: "Tokenizer", tokens, types, special_ids: set[int]) -> None:
    """Tokens that are found in the text before it is split; special ones are left out when decoding skips them."""
    from tokenizers import AddedToken

    added = []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        special = kind in (CONTROL, UNKNOWN) or index in special_ids
        if special or kind == USER_DEFINED:
            added.append(AddedToken(token, special=special, normalized=False))
    tokenizer.add_tokens(added)


def _add_template(tokenizer: "Tokenizer", names, ids, add_bos: bool, add_eos: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    if not add_bos and not add_eos:
        return

    def sequence(letter):
        return [*[names.get("bos")] * add_bos, letter, *[names.get("eos")] * add_eos]

    # As lists and not as one string: a token may hold a space.
    tokenizer.post_processor = TemplateProcessing(
        single=sequence("$A:0"), pair=[*sequence("$A:0"), *sequence("$B:1")],
        special_tokens=[(names[name], ids[name]) for name, on in (("bos", add_bos), ("eos", add_eos)) if on])
