"""Spaces of attacks: points, samplers, files."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxvaccine.experiment.config import FieldError
from jaxvaccine.experiment.spaces import SAMPLERS, Point, Range, Sort, Tried, next_point, random_point, read_sorts

RATES = Sort("rates", ({"learning_rate": Range(1e-5, 1e-3), "adapter": ("new", "continue")},
                       {"optimizer": ("sgd",), "learning_rate": Range(0.1, 10)}))
FEW = Sort("few", ({"only_layers": ("0", "1"), "steps": ("10", "20")},))


def worth(point):
    """Best at a learning rate of 1e-4, in the first space."""
    return -abs(math.log10(float(point.values["learning_rate"])) + 4) - 5 * point.space


def search(name, count, seed=0):
    tried = []
    for _ in range(count):
        point = next_point(SAMPLERS[name], RATES, tried, seed)
        tried.append(Tried(point, worth(point)))
    return tried


@given(st.integers(0, 2**32))
def test_points_lie_in_their_space(seed):
    point = random_point(RATES, (), seed)
    space = RATES.spaces[point.space]
    assert set(point.values) == set(space)
    for name, choice in space.items():
        if isinstance(choice, Range):
            assert choice.low * 0.99 <= float(point.values[name]) <= choice.high * 1.01
        else:
            assert point.values[name] in choice
    assert point == random_point(RATES, (), seed)


def test_random_points_are_even_over_logarithms():
    rates = [math.log10(float(p.values["learning_rate"])) for p in (random_point(RATES, (), s) for s in range(800))
             if p.space == 0]
    assert 330 < len(rates) < 470
    assert abs(sum(rates) / len(rates) + 4) < 0.1 and sum(rate < -4.5 for rate in rates) / len(rates) < 0.35


def test_text():
    assert Point(0, {"learning_rate": "0.001", "adapter": "new"}).text == "learning_rate=0.001:adapter=new"


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_search_is_a_function_of_its_seed(name):
    if name == "tpe":
        pytest.importorskip("optuna")
    assert search(name, 14) == search(name, 14) != search(name, 14, seed=1)


def test_tpe_learns():
    pytest.importorskip("optuna")
    late = [tried.worth for seed in range(3) for tried in search("tpe", 40, seed)[20:]]
    drawn = [tried.worth for seed in range(3) for tried in search("random", 40, seed)[20:]]
    assert sum(late) / len(late) > sum(drawn) / len(drawn) + 1


def test_a_small_space_is_used_up():
    tried = []
    while (point := next_point(random_point, FEW, tried, 3)) is not None:
        tried.append(Tried(point, 0.0))
    assert len({of.point.text for of in tried}) == len(tried) == 4


def test_sorts_of_a_file(tmp_path):
    path = tmp_path / "sorts.json"
    path.write_text(json.dumps({
        "rates": [{"learning_rate": {"from": 1e-5, "to": 1e-3}, "adapter": ["new", "continue"]},
                  {"optimizer": ["sgd"], "learning_rate": {"from": 0.1, "to": 10}}],
        "few": {"only_layers": ["0", "1"], "steps": ["10", "20"]}}))
    assert read_sorts(str(path)) == (RATES, FEW)


@pytest.mark.parametrize("content, message", [
    ({}, "at least one sort"), ({"a": []}, "settings of 'a'"), ({"a": 3}, "an object of settings in .*: a"),
    ({"a": {"steps": [1, 2]}}, r"a: steps: found \[1, 2\], expected a list of texts"),
    ({"a": {"steps": {"from": 0, "to": 1}}}, "0 < from < to"),
    ({"a": {"steps": {"from": 2, "to": 1}}}, "0 < from < to"),
    ({"a": {"steps": {"from": 1}}}, "a list of texts or"), ({"a": {"steps": []}}, "a list of texts or"),
    ({"a": {"steps": {"from": True, "to": 2}}}, "a list of texts or")])
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "sorts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FieldError, match=message):
        read_sorts(str(path))
