"""A model's tokenizer as its tokenizer.json has it, and the tokens that end its answers.

transformers' AutoTokenizer makes a tokenizer from a class, and of the file keeps vocabulary and merges alone:
normalizer, pre-tokenizer and decoder are then the class's. Here the file itself is loaded, and what the files beside it
say of its tokens must agree with it.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxvaccine import world
from jaxvaccine.json_files import decode_utf8, read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FILE, CONFIG, SPECIAL_MAP, ADDED, MODEL, GENERATION, TEMPLATE = FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json",
    "generation_config.json", "chat_template.jinja")
# What else tokenizers are stored in.
OTHERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "*.tiktoken")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

Settings = dict[str, tuple[Path, Any]]  # {field: (file, value)}


def load_tokenizer(model_dir_or_hub_id: str | os.PathLike) -> "PreTrainedTokenizerFast":
    """The tokenizer of a Hugging Face directory, a hub id or "world": ids and texts are those of its tokenizer.json.

    Padding and truncation that the file asks for are off. No code of the model's repository is run. Its attribute
    `eos_ids` holds all tokens that end an answer (`eos_ids`); training teaches `eos_token_id`.

    Raises:
      FileNotFoundError: a path that does not exist.
      ValueError: there is no tokenizer.json, it cannot be read, or it draws ids at random; a file beside it names a
        token that it lacks or has under another id, or contradicts it about BOS or EOS around a text; there is no EOS
        token (answers could not end), or an EOS id outside of the vocabulary.
    """
    directory = _find_directory(model_dir_or_hub_id)
    own = _read_tokenizer(directory / FILE)
    settings = _read_settings(directory)
    named = {name: _content(*settings[name], name) for name in NAMED if name in settings}
    _check_tokens(directory, own, settings)
    _check_around(own, settings, named)
    if "eos_token" not in named:
        raise ValueError(f"{directory}: tokenizer: found no eos_token, expected one (answers end with it)")
    with _without_a_word_on_torch():
        from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models

    template = directory / TEMPLATE
    options = {name: settings[name][1] for name in (
        "model_max_length", "padding_side", "truncation_side", "chat_template") if name in settings}
    if template.is_file():
        options["chat_template"] = decode_utf8(template.read_bytes(), template)
    # transformers adds special tokens and a post-processor to the tokenizer that it is given: not to the file's.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), name_or_path=str(directory), **named, **options)
    tokenizer._tokenizer = own
    tokenizer.eos_ids = _read_eos_ids(directory, tokenizer)
    return tokenizer


def eos_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """All tokens that end an answer, ascending.

    Of a tokenizer of `load_tokenizer` those are the EOS ids of generation_config.json, config.json and the tokenizer
    together, of another its own.

    Raises:
      ValueError: the tokenizer has no EOS token.
    """
    found = getattr(tokenizer, "eos_ids", None)
    if found is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: found no eos_token, expected one (answers end with it)")
        found = (tokenizer.eos_token_id,)
    return tuple(found)


def _find_directory(model_dir_or_hub_id: str | os.PathLike) -> Path:
    name = os.fspath(world.replace_name(model_dir_or_hub_id))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(f"{name}: found no such directory, expected a model directory or a hub id")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as e:  # the client raises a dozen unrelated types, for the network, the hub and the repository
        raise ValueError(f"{name}: found neither a local directory nor a tokenizer that the hub gives out, expected a "
                         f"{FILE} ({type(e).__name__}: {e})") from e


def _read_tokenizer(path: Path) -> "Tokenizer":
    if not path.is_file():
        others = sorted(other.name for pattern in OTHERS for other in path.parent.glob(pattern))
        raise ValueError(f"{path.parent}: found {', '.join(others) or 'no tokenizer'}, expected a {FILE}: no other "
                         "kind is read, since a conversion may change ids")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises a bare Exception
        raise ValueError(f"{path}: found what the tokenizers library does not read, expected a {FILE} ({e})") from e
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise ValueError(f"{path}: field 'model.dropout': found {dropout:.4g}, expected null: ids would be random")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _read_settings(directory: Path) -> Settings:
    """What tokenizer_config.json and special_tokens_map.json say; where they differ, what transformers takes."""
    files = [(directory / name, _read_optional(directory / name)) for name in (CONFIG, SPECIAL_MAP)]
    if "added_tokens_decoder" in files[0][1]:
        files.reverse()
    return {name: (path, value) for path, values in files for name, value in values.items() if value is not None}


def _content(path: Path, token: Any, name: str) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise ValueError(f"{path}: field {name!r}: found {token!r:.80}, expected a token")
    return content


def _mentioned(directory: Path, settings: Settings) -> Iterator[tuple[Path, str, str, int | None]]:
    """(file, field, token, its id if the field has one) of all tokens that are named beside tokenizer.json."""
    for name in NAMED:
        if name in settings:
            path, token = settings[name]
            yield path, name, _content(path, token, name), None
    for name in EXTRA:
        path, tokens = settings.get(name, (directory / CONFIG, ()))
        for token in tokens.values() if isinstance(tokens, Mapping) else tokens:
            yield path, name, _content(path, token, name), None
    name = "added_tokens_decoder"
    path, tokens = settings.get(name, (directory / CONFIG, {}))
    for index, token in tokens.items():
        yield path, name, _content(path, token, name), int(index)
    for token, index in _read_optional(directory / ADDED).items():
        yield directory / ADDED, token, token, index


def _check_tokens(directory: Path, own: "Tokenizer", settings: Settings) -> None:
    for path, name, token, index in _mentioned(directory, settings):
        found = own.token_to_id(token)
        if found is None or index not in (None, found):
            asked = "" if index is None else f" with id {index}"
            raise ValueError(f"{path}: field {name!r}: found token {token!r}{asked}, expected "
                             + (f"a token of {FILE}" if found is None else f"id {found} as in {FILE}"))
    path, tokens = settings.get("added_tokens_decoder", (directory, {}))
    added = own.get_added_tokens_decoder()
    other = [token["content"] for index, token in tokens.items() if isinstance(token, Mapping) and any(
        name in token and token[name] != getattr(added.get(int(index)), name, None) for name in FLAGS)]
    if other:
        logging.getLogger(__name__).warning(
            "%s: field 'added_tokens_decoder': %d tokens, such as %r, differ from %s in one of %s: %s holds",
            path, len(other), other[0], FILE, ", ".join(FLAGS), FILE)


def _check_around(own: "Tokenizer", settings: Settings, named: Mapping[str, str]) -> None:
    """Raises ValueError if what the config says of BOS and EOS around a text is not what the post-processor does.

    transformers follows one or the other, by class and version; which of them the model was trained with is not known.
    """
    for name, place, here in (("bos", "in front of", slice(0, 1)), ("eos", "behind", slice(-1, None))):
        if f"{name}_token" not in named or f"add_{name}_token" not in settings:
            continue
        path, asked = settings[f"add_{name}_token"]
        plain, ids = (own.encode("a", add_special_tokens=special).ids for special in (False, True))
        token = named[f"{name}_token"]
        puts = ids[here] == [own.token_to_id(token)] and ids != plain
        if asked != puts:
            raise ValueError(
                f"{path}: field 'add_{name}_token': found {str(asked).lower()}, expected {str(puts).lower()}: the "
                f"post_processor of {FILE} puts {'a' if puts else 'no'} {token!r} {place} a text; make the two agree")


def _read_eos_ids(directory: Path, tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    found = {tokenizer.eos_token_id}
    model = _read_optional(directory / MODEL)
    limit = model["vocab_size"] if isinstance(model.get("vocab_size"), int) else len(tokenizer)
    for path, values in ((directory / MODEL, model), (directory / GENERATION, _read_optional(directory / GENERATION))):
        value = values.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < limit for i in ids):
            raise ValueError(f"{path}: field 'eos_token_id': found {value!r:.80}, expected ids from 0 to {limit - 1}")
        found.update(ids)
    return tuple(sorted(found))


@contextlib.contextmanager
def _without_a_word_on_torch() -> Iterator[None]:
    """transformers warns on import where PyTorch is not installed; its tokenizers do not need it, and we never do."""
    logger = logging.getLogger("transformers")

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("PyTorch was not found")

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
