import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxvaccine.attention import rope_frequencies
from jaxvaccine.checkpoints import files
from jaxvaccine.checkpoints.gguf import convert_gguf
from jaxvaccine.checkpoints.hugging_face import load_model, resolve_model
from jaxvaccine.data import eos_ids, load_tokenizer
from jaxvaccine.llama_config import Llama3RopeScaling
from tests.checkpoints.tiny import assert_trees_equal, random_model

gguf = pytest.importorskip("gguf")

TEXTS = ["Hello world", "  leading\n\n\ttabs  ", "in 2024, 12345.67 €", "日本語 テスト 🙂👩‍👩‍👧", "", " ",
         "\r\n\r\n  \n", "a\u0301 é ﬁ \u200b x", "don't WE'LL", "<s> is no token <|end|>here", "nul \x00 and \x7f"]
PRINTABLE = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTE_TOKENS = [*PRINTABLE, *(chr(256 + n) for n in range(256 - len(PRINTABLE)))]  # GPT-2's names of all bytes
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "2 0", "20 2", "202 4", "Ġ Ġ", "' s", "Ġ 1"]
GPT2_TOKENS = ["<|unk|>", "<|begin|>", "<|end|>", *BYTE_TOKENS, *(merge.replace(" ", "") for merge in MERGES)]


def gpt2_tokenizer(writer, pre="smollm", tokens=GPT2_TOKENS, merges=MERGES, **keys):
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    if merges:
        writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)


def write_gguf(path, frozen, config, tokenizer=gpt2_tokenizer, edit=lambda tensors: tensors, arch="llama", keys=None,
               quantize=None):
    """As llama.cpp's convert_hf_to_gguf.py does it, permutation of Q and K included."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    for name, value in (keys or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](name, value)
    tokenizer(writer)

    def permute(weights, heads):
        return weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)

    layers = frozen["layers"]
    tensors = {"token_embd": frozen["embed_tokens"], "output_norm": frozen["norm"]["scale"]}
    if "lm_head" in frozen:
        tensors["output"] = frozen["lm_head"].T
    for i in range(config.num_layers):
        attention, mlp = layers["attention"], layers["mlp"]
        tensors |= {
            f"blk.{i}.attn_norm": layers["attention_norm"]["scale"][i],
            f"blk.{i}.ffn_norm": layers["mlp_norm"]["scale"][i],
            f"blk.{i}.attn_q": permute(np.asarray(attention["q_proj"]["kernel"][i].T), config.num_heads),
            f"blk.{i}.attn_k": permute(np.asarray(attention["k_proj"]["kernel"][i].T), config.num_kv_heads),
            f"blk.{i}.attn_v": attention["v_proj"]["kernel"][i].T,
            f"blk.{i}.attn_output": attention["o_proj"]["kernel"][i].T,
            **{f"blk.{i}.ffn_{name}": mlp[f"{name}_proj"]["kernel"][i].T for name in ("gate", "up", "down")},
        }
    for name, value in edit({f"{name}.weight": np.array(value, np.float32, order="C")
                             for name, value in tensors.items()}).items():
        if quantize and value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_for(tokens=GPT2_TOKENS, **changes):
    return random_model(vocab_size=len(tokens), num_layers=2, **changes)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_config_come_back(tmp_path, tied):
    model, frozen = model_for(tie_word_embeddings=tied, rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=64)
    directory = convert_gguf(write_gguf(tmp_path / "m.gguf", frozen, model.config), tmp_path / "model")
    loaded, weights = load_model(directory)
    assert loaded == model
    assert_trees_equal(weights, frozen)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_equal_transformers(tmp_path, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, frozen = model_for(hidden_size=64, intermediate_size=96, head_dim=16)
    path = write_gguf(tmp_path / "m.gguf", frozen, model.config, quantize=gguf.GGMLQuantizationType[kind])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(convert_gguf(path, tmp_path / "model"))
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_output(tmp_path, dtype):
    model, frozen = model_for()
    loaded, weights = load_model(convert_gguf(
        write_gguf(tmp_path / "m.gguf", frozen, model.config), tmp_path / "model", dtype), dtype=dtype)
    assert loaded.dtype == jnp.dtype(dtype)
    assert_trees_equal(weights, jax.tree.map(lambda leaf: leaf.astype(dtype), frozen))
    with pytest.raises(ValueError, match="dtype: found int8, expected one of float32"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "other", "int8")


def with_divisors(divisors):
    return lambda tensors: {**tensors, "rope_freqs.weight": np.asarray(divisors, np.float32)}


def test_llama3_rope_scaling_is_recognised(tmp_path):
    model, frozen = model_for(rope_theta=5e5, head_dim=32)
    scaled = dataclasses.replace(model.config, rope_scaling=Llama3RopeScaling(32.0, 1.0, 4.0, 8192))
    divisors = rope_frequencies(model.config) / rope_frequencies(scaled)
    assert len(set(divisors)) > 2
    path = write_gguf(tmp_path / "m.gguf", frozen, model.config, edit=with_divisors(divisors))
    assert load_model(convert_gguf(path, tmp_path / "model"))[0].config == scaled
    path = write_gguf(tmp_path / "one.gguf", frozen, model.config, edit=with_divisors(np.ones(16)))
    assert load_model(convert_gguf(path, tmp_path / "one"))[0].config == model.config


@pytest.mark.parametrize(("change", "message"), [
    ({"arch": "qwen2"}, "key 'general.architecture': found 'qwen2', expected 'llama': not supported"),
    ({"keys": {"llama.rope.scaling.type": "yarn"}}, "key 'llama.rope.scaling.type': found 'yarn', expected 'none'"),
    ({"keys": {"llama.rope.scaling.type": "linear"}}, "found 'linear', expected 'none': not supported"),
    ({"keys": {"llama.rope.scale_linear": 2.0}}, "key 'llama.rope.scale_linear': found 2.0, expected 1.0"),
    ({"keys": {"llama.expert_count": 8}}, "key 'llama.expert_count': found 8, expected it off: not supported"),
    ({"keys": {"llama.attention.sliding_window": 4096}}, "key 'llama.attention.sliding_window': found 4096"),
    ({"keys": {"split.count": 3}}, "key 'split.count': found 3, expected a model in one file"),
    ({"edit": with_divisors([1, 2, 3, 4, 5])}, "tensor 'rope_freqs.weight': found .5,. divisors from 1.0 to 5.0"),
    ({"edit": with_divisors([1, 2])}, "tensor 'rope_freqs.weight': found .2,. divisors"),
    ({"edit": lambda t: {**t, "blk.0.attn_q.bias": np.ones(40, np.float32)}}, "tensor 'blk.0.attn_q.bias': found, exp"),
    ({"edit": lambda t: {k: v for k, v in t.items() if k != "blk.1.ffn_up.weight"}},
     r"tensor 'blk.1.ffn_up.weight': missing, expected shape \[80, 48\]"),
    ({"edit": lambda t: {**t, "blk.1.ffn_up.weight": t["blk.1.ffn_up.weight"].T.copy()}},
     r"tensor 'blk.1.ffn_up.weight': found shape \[48, 80\], expected \[80, 48\]"),
    ({"tokenizer": lambda w: gpt2_tokenizer(w, pre="qwen2")}, "key 'tokenizer.ggml.pre': found 'qwen2', expected"),
    ({"tokenizer": lambda w: w.add_tokenizer_model("t5")}, "key 'tokenizer.ggml.model': found 't5', expected 'gpt2'"),
    ({"tokenizer": lambda w: None}, "key 'tokenizer.ggml.model': found None"),
    ({"tokenizer": lambda w: gpt2_tokenizer(w, merges=[])}, "key 'tokenizer.ggml.merges': found none"),
    ({"tokenizer": lambda w: gpt2_tokenizer(w, merges=[*MERGES, "q q"])}, "merges': found 'q q' at 12"),
    ({"tokenizer": lambda w: gpt2_tokenizer(w, tokens=[*GPT2_TOKENS, "more"])}, "found 272 tokens, expected 1 to 271"),
    ({"tokenizer": lambda w: gpt2_tokenizer(w, tokens=[*GPT2_TOKENS[:-1], "<|end|>"])}, "found only 270 different"),
    ({"tokenizer": lambda w: gpt2_tokenizer(w, pad_token_id=271)}, "padding_token_id': found 271, expected an id"),
])
def test_what_is_not_supported_is_named(tmp_path, change, message):
    model, frozen = model_for()
    path = write_gguf(tmp_path / "m.gguf", frozen, model.config, **change)
    with pytest.raises(ValueError, match=r"m\.gguf: .*" + message):
        convert_gguf(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.9999])
def test_truncated_file(tmp_path, share):
    model, frozen = model_for()
    path = write_gguf(tmp_path / "m.gguf", frozen, model.config)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"m\.gguf: found a damaged or truncated file of {path.stat().st_size} bytes"):
        convert_gguf(path, tmp_path / "model")


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip file", b"GGUF" + b"\xff" * 200, b"GGUF" + bytes(200)])
def test_not_gguf(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf: "):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: found no such file"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "model")


def test_nothing_is_overwritten(tmp_path):
    model, frozen = model_for()
    path = write_gguf(tmp_path / "m.gguf", frozen, model.config)
    convert_gguf(path, tmp_path / "model")
    with pytest.raises(FileExistsError, match=r"found a model \(config.json\)"):
        convert_gguf(path, tmp_path / "model")


def test_conversion_is_deterministic_and_cached_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    model, frozen = model_for()
    path = write_gguf(tmp_path / "m.gguf", frozen, model.config)
    cached, again = resolve_model(path), convert_gguf(path, tmp_path / "model")
    assert cached.is_relative_to(tmp_path / "cache")
    assert sorted(p.name for p in cached.iterdir()) == sorted(p.name for p in again.iterdir())
    for file in cached.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    assert_trees_equal(load_model(path)[1], frozen)

    monkeypatch.setattr(files, "write_shards", lambda *_: pytest.fail("converted a second time"))
    assert resolve_model(str(path)) == cached
    monkeypatch.undo()
    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    _, other = random_model(seed=3, vocab_size=len(GPT2_TOKENS), num_layers=2)
    write_gguf(path, other, model.config)
    assert resolve_model(path) != cached
    assert_trees_equal(load_model(path)[1], other)


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXVACCINE_CACHE", str(tmp_path / "cache"))
    model, frozen = model_for()
    path = write_gguf(tmp_path / "m.gguf", frozen, model.config)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files, "write_shards", full)
    with pytest.raises(OSError, match="disk full"):
        resolve_model(path)
    assert list((tmp_path / "cache/gguf").iterdir()) == []


def converted_tokenizer(directory, tokenizer, tokens=GPT2_TOKENS):
    from tokenizers import Tokenizer

    model, frozen = model_for(tokens)
    convert_gguf(write_gguf(directory / "m.gguf", frozen, model.config, tokenizer), directory / "model")
    return Tokenizer.from_file(str(directory / "model/tokenizer.json"))


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    return converted_tokenizer(tmp_path_factory.mktemp("smollm"), gpt2_tokenizer)


@settings(max_examples=25)
@given(text=st.text())
def test_byte_level_round_trip(smollm, text):
    assert smollm.decode(smollm.encode(text).ids) == text


def test_pre_tokenizers_differ_in_digits(tmp_path, smollm):
    def tokens(tokenizer, text):
        return tokenizer.encode(text).tokens

    assert tokens(smollm, "hello 2024") == ["hello", "Ġ", "2", "0", "2", "4"]
    for pre in ("gpt-2", None):
        (tmp_path / str(pre)).mkdir()
        gpt2 = converted_tokenizer(tmp_path / str(pre), lambda writer, pre=pre: gpt2_tokenizer(writer, pre))
        assert tokens(gpt2, "hello 2024") == ["hello", "Ġ", "2024"]
    llama3 = converted_tokenizer(tmp_path, lambda writer: gpt2_tokenizer(writer, "llama-bpe"))
    assert tokens(llama3, "hello 2024 1") == ["<|begin|>", "hello", "Ġ", "202", "4", "Ġ", "1"]


def test_control_tokens_are_special(smollm):
    encoded = smollm.encode("<|begin|>hello<|end|>")
    assert encoded.tokens == ["<|begin|>", "hello", "<|end|>"]
    assert encoded.ids[:1] == [1]
    assert smollm.decode(encoded.ids) == "hello"
    assert smollm.decode(encoded.ids, skip_special_tokens=False) == "<|begin|>hello<|end|>"
    assert [smollm.token_to_id(token) for token in GPT2_TOKENS] == list(range(len(GPT2_TOKENS)))


@pytest.mark.parametrize(("keys", "expected"), [
    ({}, ["hello"]), ({"add_bos_token": True}, ["<|begin|>", "hello"]), ({"add_eos_token": True}, ["hello", "<|end|>"]),
    ({"add_bos_token": True, "add_eos_token": True}, ["<|begin|>", "hello", "<|end|>"]),
])
def test_bos_and_eos(tmp_path, keys, expected):
    tokenizer = converted_tokenizer(tmp_path, lambda writer: gpt2_tokenizer(writer, **keys))
    assert tokenizer.encode("hello").tokens == expected
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.convert_ids_to_tokens(theirs("hello").input_ids) == expected


def test_special_tokens_and_template_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    converted_tokenizer(tmp_path, lambda writer: gpt2_tokenizer(
        writer, pad_token_id=2, chat_template="{% for m in messages %}<|begin|>{{ m['content'] }}{% endfor %}"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.is_fast
    assert [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "bos", "eos", "pad")] == [0, 1, 2, 2]
    assert tokenizer.apply_chat_template([{"content": "é"}], tokenize=False) == "<|begin|>é"
    fields = json.loads((tmp_path / "model/config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, 2, 2)
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(("extra", "keys", "expected"), [
    ((), {}, (2,)), (("<|eot_id|>", "<|eom_id|>"), {}, (2, -2, -1)), (("<|im_end|>",), {}, (2, -1)),
    (("<|turn|>",), {"eot_token_id": -1}, (2, -1)), (("<|message|>", "<|x|>"), {"eom_token_id": -2}, (2, -2)),
    (("<|tool|>", "eot"), {}, (2,)), (("<EOT>",), {}, (2,)),  # of no such name; no control token
])
def test_all_tokens_that_end_an_answer(tmp_path, extra, keys, expected):
    """As llama.cpp has them: by metadata, and by the name of a control token. Negative: counted from the last token."""
    tokens = [*GPT2_TOKENS, *extra]
    converted_tokenizer(tmp_path, lambda writer: gpt2_tokenizer(
        writer, tokens=tokens, **{key: len(tokens) + index for key, index in keys.items()}), tokens)
    loaded = load_tokenizer(tmp_path / "model")
    assert eos_ids(loaded) == tuple(sorted(index % len(tokens) for index in expected))
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|end|>", 2)


def test_an_end_outside_of_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r"key 'tokenizer\.ggml\.eot_token_id': found 9999, expected an id below"):
        converted_tokenizer(tmp_path, lambda writer: gpt2_tokenizer(writer, eot_token_id=9999))


def test_byte_level_equals_transformers(tmp_path):
    """transformers takes every gpt2 model of architecture llama for ByteLevel alone, which GPT-2's own is."""
    pytest.importorskip("torch")  # transformers reads GGUF through it
    transformers = pytest.importorskip("transformers")
    ours = converted_tokenizer(tmp_path, lambda writer: gpt2_tokenizer(writer, "gpt-2"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids, text


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    """A SentencePiece BPE like Llama 2's, and its conversion."""
    spm = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("spm")
    text = [" ".join(TEXTS), "the quick brown fox jumps over the lazy dog " * 3,
            "hello hello yellow fellow follow  two "]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 5), model_prefix=str(directory / "spm"), vocab_size=380, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        allow_whitespace_only_pieces=True, split_digits=True, character_coverage=0.98)
    return spm.SentencePieceProcessor(model_file=str(directory / "spm.model"))


def spm_tokenizer(spm, scores=None, **keys):
    ids = range(spm.get_piece_size())
    kinds = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in ids]

    def write(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([spm.id_to_piece(i) for i in ids])
        writer.add_token_scores([spm.get_score(i) for i in ids] if scores is None else scores)
        writer.add_token_types(kinds)
        writer.add_unk_token_id(spm.unk_id())
        writer.add_bos_token_id(spm.bos_id())
        writer.add_eos_token_id(spm.eos_id())
        for key, value in keys.items():
            getattr(writer, f"add_{key}")(value)

    return write


def test_sentence_piece_equals_the_original(tmp_path, sentence_piece):
    pieces = range(sentence_piece.get_piece_size())
    ours = converted_tokenizer(tmp_path, spm_tokenizer(sentence_piece), pieces)

    @settings(max_examples=100)
    @given(text=st.text(st.sampled_from("helo wyf thequickbrn  1 23é日\n🙂▁"), max_size=40))
    def equal(text):
        text = text.replace("<", "")
        ids = sentence_piece.encode(text, add_bos=True)
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == sentence_piece.decode(ids[1:])

    equal()
    for text in filter(None, TEXTS):
        if "<" not in text and "\x00" not in text:
            assert ours.encode(text).ids == sentence_piece.encode(text, add_bos=True), text


def test_sentence_piece_that_cannot_be_ordered(tmp_path, sentence_piece):
    size = sentence_piece.get_piece_size()
    with pytest.raises(ValueError, match=r"key 'tokenizer.ggml.scores': found pieces of equal scores, expected"):
        converted_tokenizer(tmp_path, spm_tokenizer(sentence_piece, [0.0] * size), range(size))
