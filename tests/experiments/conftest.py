"""Fixtures of the scripts' tests."""

import functools

import pytest

from tests.experiment import small_world


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny LLaMA with a tokenizer for any text, as a Hugging Face directory."""
    return small_world.text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def world_model(tmp_path_factory):
    """layers -> the directory of a model of the small world with random weights."""
    return functools.cache(lambda layers=3: small_world.world_model(tmp_path_factory.mktemp("world"), layers))
