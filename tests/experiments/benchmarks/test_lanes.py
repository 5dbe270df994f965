"""Lanes share one backbone, whatever their number."""

import pytest

from experiments.benchmarks import lanes as benchmark
from jaxvaccine.experiment.config import FieldError
from jaxvaccine.memory import tree_bytes
from tests.experiment.small_world import world_model

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return world_model(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("turns", [True, False])
def test_the_backbone_is_held_once(model, turns, monkeypatch):
    """In bytes: arguments grow by a lane's state and batches, temporary memory by less than half a backbone a lane."""
    monkeypatch.setattr(benchmark.lanes, "take_turns", lambda: turns)
    benchmark.lanes.compiled.cache_clear()
    config = benchmark.LanesConfig(model=model, rows=1, length=4, rank=1)
    few, many = (benchmark.program(config, count) for count in (2, 8))
    own = [tree_bytes(of.arguments[0]) for of in (few, many)]
    assert many.backbone == few.backbone > own[1] / 8
    # Three trees like the adapter, and the batch.
    assert 3 * own[0] < few.memory.arguments - few.backbone < 4 * own[0]
    assert many.memory.arguments - few.memory.arguments < 4 * (own[1] - own[0])
    assert many.memory.temporary - few.memory.temporary < 6 * few.backbone / 2


@pytest.mark.long
def test_the_table(model):
    text = benchmark.benchmark(benchmark.LanesConfig(
        model=model, method="t_vaccine:layers=1", lanes=("1", "3"), rows=1, length=4, rank=1, repeats=1))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[4:]]
    assert [row[0] for row in rows] == ["1", "3"] and rows[0][-1] == "1.00" and float(rows[1][-1]) > 0
    with pytest.raises(FieldError, match="found 'lisa', expected one of the alignment"):
        benchmark.program(benchmark.LanesConfig(model=model, method="lisa"), 1)
    with pytest.raises(FieldError, match="expected numbers of at least 1"):
        benchmark.LanesConfig(lanes=("0",))
