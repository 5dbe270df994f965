"""Fixtures of the benchmarks' tests."""

import json

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def shape_dir(tmp_path_factory):
    """A folder with the tiny model's config.json, for weights that are random."""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG.to_hugging_face()))
    return str(folder)
