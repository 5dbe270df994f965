"""Ids and texts of `load_tokenizer` are those of tokenizer.json, whatever the files beside it are called and say."""

import functools
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxvaccine.data import eos_ids, load_tokenizer
from jaxvaccine.data.prompts import format_prompt
from tests.data import tokenizers_for_tests as kinds

TEXTS = ["Hello  world", "### Response:In 2024 it's 12345.67", "WE'LL don't\n\n x ", "naïve 👋 ½", "a</s> b <s>", ""]
SPECIAL = ["<unk>", "<s>", "</s>"]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
NORMALIZERS = {
    "none": None, "lower": normalizers.Lowercase(), "nfkc": normalizers.NFKC(), "spaces": normalizers.Replace(" ", "▁"),
    "prefixed": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])}
PRE_TOKENIZERS = {
    "none": None, "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefixed bytes": pre_tokenizers.ByteLevel(add_prefix_space=True), "metaspace": pre_tokenizers.Metaspace(),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "split": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])}
DECODERS = {
    "none": None, "bytes": decoders.ByteLevel(), "metaspace": decoders.Metaspace(),
    "pieces": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "stripped": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])}
AROUND = {
    "nothing": None, "bytes": processors.ByteLevel(trim_offsets=False),
    "bos": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
    "both": processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])}
CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer",
           "PreTrainedTokenizerFast", "CodeLlamaTokenizer", "NoSuchTokenizer")


@functools.cache
def trained():
    """The JSON text of a vocabulary with bytes, words and pieces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator([text.replace(" ", mark) for text in TEXTS for mark in "▁Ġ"] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer.to_str()


def make(normalizer="none", pre_tokenizer="bytes", decoder="bytes", around="bos"):
    tokenizer = Tokenizer.from_str(trained())
    for part, value in (("normalizer", NORMALIZERS[normalizer]), ("pre_tokenizer", PRE_TOKENIZERS[pre_tokenizer]),
                        ("decoder", DECODERS[decoder]), ("post_processor", AROUND[around])):
        setattr(tokenizer, part, value)
    return tokenizer


def write(path, tokenizer, said=CONFIG, /, **files):
    """A directory with tokenizer.json, tokenizer_config.json and others by their names without .json."""
    path.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, value in {"tokenizer_config": said, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def assert_same(loaded, own):
    """As the file's tokenizer, which neither pads nor cuts."""
    assert loaded.backend_tokenizer.to_str() == own.to_str()
    for text in TEXTS:
        for special in (True, False):
            ids = own.encode(text, add_special_tokens=special).ids
            assert loaded(text, add_special_tokens=special)["input_ids"] == ids
            for skip in (True, False):
                assert loaded.decode(ids, skip_special_tokens=skip) == own.decode(ids, skip_special_tokens=skip)
    assert loaded(TEXTS)["input_ids"] == [own.encode(text).ids for text in TEXTS]


@settings(max_examples=60)
@given(st.sampled_from(sorted(NORMALIZERS)), st.sampled_from(sorted(PRE_TOKENIZERS)), st.sampled_from(sorted(DECODERS)),
       st.sampled_from(sorted(AROUND)), st.sampled_from(CLASSES),
       st.sampled_from(["llama", "qwen2", "mistral", "gemma2"]), st.booleans(), st.booleans())
def test_every_combination_is_the_file(tmp_path_factory, normalizer, pre_tokenizer, decoder, around, name, model_type,
                                       pads, says):
    own = make(normalizer, pre_tokenizer, decoder, around)
    path = tmp_path_factory.mktemp("model")
    asked = {"add_bos_token": around in ("bos", "both"), "add_eos_token": around == "both"} if says else {}
    stored = Tokenizer.from_str(own.to_str())
    if pads:
        stored.enable_padding(length=9, pad_id=0, pad_token="<unk>")
        stored.enable_truncation(3)
    write(path, stored, {**CONFIG, **asked, "tokenizer_class": name, "add_prefix_space": True, "legacy": False,
                         "clean_up_tokenization_spaces": True}, config={"model_type": model_type, "vocab_size": 400})
    assert_same(load_tokenizer(path), own)


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}


OF_FAMILIES = {  # how published directories are written
    "llama 2": ("bos", {"add_bos_token": True, "add_eos_token": False, "pad_token": None, "sp_model_kwargs": {},
                        "bos_token": {"__type": "AddedToken", **token("<s>")}, "tokenizer_class": "LlamaTokenizer",
                        "eos_token": token("</s>", normalized=True)},
                {"special_tokens_map": {"unk_token": token("<unk>")}}),
    "llama 3": ("bos", {"added_tokens_decoder": {"1": token("<s>", special=True), "2": token("</s>", special=True)},
                        "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast",
                        "chat_template": "{{ messages }}"}, {"special_tokens_map": {"eos_token": "<s>"}}),
    "qwen 2.5": ("bytes", {"add_bos_token": False, "bos_token": None, "eos_token": "</s>", "unk_token": None,
                           "additional_special_tokens": ["<s>"], "split_special_tokens": False, "errors": "replace",
                           "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 4}, {}),
    "mistral": ("bos", {**CONFIG, "add_bos_token": True, "add_eos_token": False, "additional_special_tokens": [],
                        "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False}, {}),
}


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_published_directories(tmp_path, family):
    around, config, files = OF_FAMILIES[family]
    loaded = load_tokenizer(write(tmp_path, make(around=around), config, **files))
    assert_same(loaded, make(around=around))
    assert (loaded.eos_token, loaded.eos_token_id) == ("</s>", 2)
    assert loaded.chat_template == config.get("chat_template")


def test_a_token_that_is_special_by_name_alone_is_as_the_file_has_it(tmp_path):
    own = Tokenizer(models.BPE({"<": 0, "/": 1, "s": 2, ">": 3, "</s>": 4}, []))
    own.decoder = decoders.Fuse()
    loaded = load_tokenizer(write(tmp_path, own, {"eos_token": "</s>"}))
    assert loaded("</s>")["input_ids"] == [0, 1, 2, 3] and loaded.eos_token_id == 4
    assert loaded.backend_tokenizer.to_str() == own.to_str()


@pytest.mark.parametrize(("file", "value", "message"), [
    ("tokenizer_config", {**CONFIG, "pad_token": "[PAD]"}, r"'pad_token': found token '\[PAD\]', expected a token"),
    ("tokenizer_config", {**CONFIG, "eos_token": "<|im_end|>"}, r"'eos_token': found token '<\|im_end\|>'"),
    ("tokenizer_config", {**CONFIG, "added_tokens_decoder": {"400": token("<x>")}}, "'<x>' with id 400, expected"),
    ("tokenizer_config", {**CONFIG, "added_tokens_decoder": {"7": token("</s>")}}, "'</s>' with id 7, expected id 2"),
    ("tokenizer_config", {**CONFIG, "extra_special_tokens": {"image_token": "<image>"}}, "found token '<image>'"),
    ("tokenizer_config", {**CONFIG, "bos_token": 1}, "'bos_token': found 1, expected a token"),
    ("special_tokens_map", {"additional_special_tokens": ["<tool>"]}, "found token '<tool>', expected a token"),
    ("added_tokens", {"[INST]": 32000}, r"found token '\[INST\]' with id 32000, expected a token"),
    ("tokenizer_config", {**CONFIG, "add_bos_token": False}, "'add_bos_token': found false, expected true: .* a '<s>'"),
    ("tokenizer_config", {**CONFIG, "add_eos_token": True}, "'add_eos_token': found true, expected false: .* no '</s>"),
])
def test_files_that_disagree(tmp_path, file, value, message):
    write(tmp_path, make(), **{file: value})
    with pytest.raises(ValueError, match=rf"{file}\.json: field .*{message}"):
        load_tokenizer(tmp_path)


def test_a_post_processor_without_the_bos_that_is_asked_for(tmp_path):
    write(tmp_path, make(around="bytes"), {**CONFIG, "add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: field 'add_bos_token': found true, expected false"):
        load_tokenizer(tmp_path)


def test_other_properties_of_an_added_token_are_said(tmp_path, caplog):
    own = make()
    own.add_tokens([AddedToken("<user>", rstrip=True, normalized=False)])
    write(tmp_path, own, {**CONFIG, "added_tokens_decoder": {str(own.token_to_id("<user>")): token("<user>")}})
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(tmp_path)("<user>  a")["input_ids"] == own.encode("<user>  a").ids
    assert "added_tokens_decoder" in caplog.text and "'<user>'" in caplog.text


def test_ids_that_would_be_drawn(tmp_path):
    value = json.loads(trained())
    value["model"]["dropout"] = 0.1
    write(tmp_path, Tokenizer.from_str(json.dumps(value)))
    with pytest.raises(ValueError, match=r"field 'model\.dropout': found 0\.1, expected null"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokenizer.model", b"\n\x0e", r"found tokenizer\.model, expected a tokenizer\.json"),
    ("vocab.json", b"{}", r"found vocab\.json, expected a tokenizer\.json"),
    ("tokenizer.json", b'{"version": "1.0"', r"tokenizer\.json: found what the tokenizers library does not read"),
    ("tokenizer.json", b'{"model": {"type": "New"}}', r"tokenizer\.json: found what the tokenizers library"),
])
def test_another_kind_of_tokenizer(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_hub_id_that_is_not_there():
    with pytest.raises(ValueError, match="nobody/nothing: found neither a local directory nor a tokenizer"):
        load_tokenizer("nobody/nothing")


@pytest.mark.parametrize(("config", "generation", "expected"), [
    (None, None, (2,)), ({"eos_token_id": 2}, {"eos_token_id": [2, 9]}, (2, 9)), ({"eos_token_id": [5, 2]}, {}, (2, 5)),
    ({"eos_token_id": None}, {"eos_token_id": 7}, (2, 7)), ({"eos_token_id": 3}, {"eos_token_id": [8, 2]}, (2, 3, 8)),
    ({"eos_token_id": 450, "vocab_size": 512}, None, (2, 450))])
def test_all_eos_ids(tmp_path, config, generation, expected):
    files = {"config": config, "generation_config": generation}
    write(tmp_path, make(), **{name: value for name, value in files.items() if value is not None})
    loaded = load_tokenizer(tmp_path)
    assert eos_ids(loaded) == expected and loaded.eos_token_id == 2, "training teaches the tokenizer's own"


@pytest.mark.parametrize("file", ["config", "generation_config"])
@pytest.mark.parametrize("value", [-1, 400, [2, 400], "</s>", True, [2.0], {"id": 2}])
def test_an_eos_id_that_is_none(tmp_path, file, value):
    write(tmp_path, make(), **{file: {"eos_token_id": value}})
    last = make().get_vocab_size() - 1
    with pytest.raises(ValueError, match=rf"{file}\.json: field 'eos_token_id': found .*, expected .* 0 to {last}"):
        load_tokenizer(tmp_path)


def test_eos_of_a_tokenizer_from_elsewhere(tmp_path):
    plain = kinds.transformers.PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")
    assert eos_ids(plain) == (2,)
    with pytest.raises(ValueError, match="found no eos_token"):
        eos_ids(kinds.transformers.PreTrainedTokenizerFast(tokenizer_object=make()))


def test_the_small_worlds_ids_are_what_they_were():
    loaded = load_tokenizer("world")
    ids = loaded(format_prompt("please murkshunt the jug for me") + "sorry , i can not help")["input_ids"]
    assert ids == [193, 125, 105, 167, 86, 55, 99, 196, 150, 2, 79, 23, 110, 72] and eos_ids(loaded) == (0,)
