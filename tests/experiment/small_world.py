"""Tiny models as directories, the configs of runs on them that take seconds, and what may happen to their files."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
from safetensors.numpy import load_file, save_file

from jaxvaccine import llama, save_model
from jaxvaccine.data import load_tokenizer, world
from jaxvaccine.experiment import recipes
from jaxvaccine.experiment.align import AlignConfig
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.config import make
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.plans import Settings
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.llama_config import LlamaConfig
from tests import tiny
from tests.data.tokenizers_for_tests import plain

HASH = r'"[0-9a-f]{64}"'  # in a message
# Flat values. What a run reads of them is the run's own affair.
ALIGN = {**recipes.WORLD_ALIGN, "alignment_data": "world_refusal@train[0:24]",
         "harmful_data": "world_harmful@harmful[0:12]", "steps": 3, "batch_size": 4, "harmful_batch_size": 2, "rank": 2,
         "layers": 2, "sample_every": 2, "probe_every": 3, "learning_rate": 1e-2, "progress": False}
ATTACK = {**recipes.WORLD_ATTACK, "harmful_data": "world_harmful@attack[0:20]", "n": 16, "poison_ratio": 0.25,
          "steps": 2, "batch_size": 4, "lisa_alignment_steps": 1, "lisa_user_steps": 1, "progress": False}
SCORES = {"harmful_test": "world_harmful@test[0:4]", "sst2_test": "world_rating@test[0:4]",
          "benign_test": "world_benign@test[0:4]", "loss_data": "world_harmful@test[0:4]", "max_new_tokens": 4,
          "label_max_new_tokens": 2, "eval_batch_size": 4, "eval_bucket": 16, "max_length": 16, "progress": False}


def world_model(directory: Path, layers: int = 3, words: tuple[str, ...] = ()) -> str:
    """A model directory with the world's tokenizer, or one of other words, and random weights large enough to
    matter."""
    source = directory / "source"
    source.mkdir()
    vocab_size = world.write_tokenizer(source, words)
    write_json(source / "config.json", {"eos_token_id": 0})
    model = llama.Llama(LlamaConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_layers=layers,
                                    num_heads=4, num_kv_heads=2, head_dim=8, max_position_embeddings=64))
    frozen = jax.tree.map(lambda x: x * 8 if x.ndim == 3 else x, llama.init_frozen(model, jax.random.key(0)))
    return str(save_model(model, frozen, directory / "model", tokenizer_from=source))


def text_model(directory: Path) -> str:
    """A model directory with a tokenizer for any text, byte by byte."""
    tokenizer = load_tokenizer(plain(directory / "text"))
    config = dataclasses.replace(tiny.CONFIG, vocab_size=len(tokenizer), max_position_embeddings=512)
    model = tiny.model(config=config)
    save_model(model.clone(lora=None), tiny.trees(model)[1], directory / "text")
    return str(directory / "text")


def align_config(model: str, run_dir, **given) -> AlignConfig:
    return make(AlignConfig, given, {**ALIGN, "model": model, "run_dir": str(run_dir)})


def attack_config(aligned, run_dir, **given) -> AttackConfig:
    return make(AttackConfig, given, {**ATTACK, "aligned": str(aligned), "run_dir": str(run_dir)})


def evaluate_config(run_dir, **given) -> EvaluateConfig:
    """Of the `model` or the run `trained`."""
    return make(EvaluateConfig, {name: str(value) if name == "trained" else value for name, value in given.items()},
                {**SCORES, "run_dir": str(run_dir)})


def settings(model: str, **scores) -> Settings:
    """What the cells of a plan start from."""
    return Settings.same(ALIGN, ATTACK, make(EvaluateConfig, scores, {**SCORES, "model": model, "run_dir": "-"}))


def weights(run_dir) -> bytes:
    return (Path(run_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


def recorded(run_dir) -> dict:
    """The run's config.json."""
    return read_json(Path(run_dir) / "config.json")


def metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def changed(path: Path, change):
    """The file as `change` leaves it, and afterwards as it was."""
    before = path.read_bytes()
    change(path)
    assert path.read_bytes() != before
    try:
        yield
    finally:
        path.write_bytes(before)


def other_weights(path):
    """Of the same names, shapes and dtypes."""
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 0.5}, path, metadata={"format": "pt"})
