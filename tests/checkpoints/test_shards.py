"""Safetensors in shards, as huggingface_hub splits them."""

import json
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxvaccine.checkpoints.files import INDEX, NewTensor, write_shards


def tensors(sizes, read=lambda value: value):
    """float32 tensors with so many elements each."""
    values = {f"t{i}": np.full(size, i, np.float32) for i, size in enumerate(sizes)}
    return values, [NewTensor(name, value.nbytes, lambda value=value: read(value)) for name, value in values.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 200))
def test_all_tensors_in_shards_within_the_limit(folder, sizes, limit):
    for path in folder.iterdir():
        path.unlink()
    values, new = tensors(sizes)
    write_shards(folder, new, limit)
    files = sorted(folder.glob("*.safetensors"))
    loaded = {file.name: load_file(file) for file in files}
    for shard in loaded.values():
        assert len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= limit
    found = {name: value for shard in loaded.values() for name, value in shard.items()}
    assert found.keys() == values.keys() and all(np.array_equal(found[name], values[name]) for name in values)
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not (folder / INDEX).exists()
        return
    assert [file.name for file in files] == [f"model-{i:05}-of-{len(files):05}.safetensors"
                                             for i in range(1, len(files) + 1)]
    assert json.loads((folder / INDEX).read_text()) == {
        "metadata": {"total_size": 4 * sum(sizes)},
        "weight_map": {name: file for file, shard in loaded.items() for name in shard}}


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    alive, seen = set(), []

    def read(value):
        copy, number = value.copy(), len(seen)
        alive.add(number)
        weakref.finalize(copy, alive.remove, number)
        seen.append((len(alive), len(list(tmp_path.glob("*.safetensors")))))
        return copy

    write_shards(tmp_path, tensors([25] * 7, read)[1], 200)
    assert seen == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (2, 2), (1, 3)], "arrays in memory, files written"
