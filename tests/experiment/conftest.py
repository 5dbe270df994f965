"""Fixtures of the experiment's tests."""

import pytest

from jaxvaccine.experiment.align import align
from tests.experiment import small_world


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A model of the small world, as a Hugging Face directory."""
    return small_world.world_model(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def aligned(model_dir, tmp_path_factory):
    """The config of a finished alignment with SFT."""
    config = small_world.align_config(model_dir, tmp_path_factory.mktemp("runs") / "sft")
    align(config)
    return config
