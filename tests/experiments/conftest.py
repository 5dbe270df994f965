"""Fixtures of the scripts' tests."""

import dataclasses
import functools

import pytest

from jaxvaccine import save_model
from jaxvaccine.data import load_tokenizer
from tests import tiny
from tests.data.tokenizers_for_tests import plain
from tests.experiments import small


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny LLaMA with a tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = load_tokenizer(plain(directory))
    config = dataclasses.replace(tiny.CONFIG, vocab_size=len(tokenizer), max_position_embeddings=512)
    model = tiny.model(config=config).clone(lora=None)
    _, frozen = tiny.trees(tiny.model(config=config))
    save_model(model, frozen, directory)
    return str(directory)


@pytest.fixture(scope="session")
def world_model(tmp_path_factory):
    """layers -> the directory of a model of the small world with random weights."""
    return functools.cache(lambda layers=3: small.world_model(tmp_path_factory.mktemp("world"), layers))
