"""Fixtures of the studies' tests."""

import pytest


@pytest.fixture(scope="module")
def model_dir(world_model):
    """A model of the small world with two layers; where more are needed a test has its own."""
    return world_model(2)
