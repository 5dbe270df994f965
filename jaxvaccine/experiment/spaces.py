"""What an attacker may choose: sorts of attacks, each a space of settings, and how the next setting to try is chosen.

A space is a mapping {setting of an attack: what it may be}: texts to choose from, or a range of numbers. A point of it
is the text of an attack, as a plan has it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvaccine.data.batching import stream_seed
from jaxvaccine.experiment.config import FieldError, require
from jaxvaccine.json_files import read_json_object

# How often a point that was tried already is drawn anew before a space counts as used up.
REDRAWS = 20


class Range(NamedTuple):
    """Numbers from `low` to `high`, evenly spread over their logarithms."""

    low: float
    high: float


Choice = tuple[str, ...] | Range
Space = Mapping[str, Choice]


@dataclasses.dataclass(frozen=True)
class Sort:
    """A sort of attack.

    Attributes:
      name: of the sort, for people.
      spaces: what may be chosen; one of several where settings depend on each other, as learning rates on optimizers.
      of: the alignment's defenses that it is an attack on; () is all.
    """

    name: str
    spaces: tuple[Space, ...]
    of: tuple[str, ...] = ()


class Point(NamedTuple):
    """A point of a sort's spaces: in which of them, and {setting: text}."""

    space: int
    values: Mapping[str, str]

    @property
    def text(self) -> str:
        return ":".join(f"{name}={value}" for name, value in self.values.items())


class Tried(NamedTuple):
    """A point and what it was worth: the larger, the stronger the attack."""

    point: Point
    worth: float


Sampler = Callable[[Sort, Sequence[Tried], int], Point]


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def random_point(sort: Sort, tried: Sequence[Tried], seed: int) -> Point:
    """A point drawn evenly from the sort's spaces, each as likely as the others."""
    del tried
    rng = np.random.default_rng(seed)
    index = int(rng.integers(len(sort.spaces)))
    return Point(index, {
        name: number(math.exp(rng.uniform(math.log(choice.low), math.log(choice.high))))
        if isinstance(choice, Range) else choice[rng.integers(len(choice))]
        for name, choice in sort.spaces[index].items()})


def tpe_point(sort: Sort, tried: Sequence[Tried], seed: int) -> Point:
    """The point that Optuna's tree-structured Parzen estimator proposes after what was tried."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {f"{index}/{name}": optuna.distributions.FloatDistribution(choice.low, choice.high, log=True)
              if isinstance(choice, Range) else optuna.distributions.CategoricalDistribution(choice)
              for index, space in enumerate(sort.spaces) for name, choice in space.items()}
    which = optuna.distributions.CategoricalDistribution(range(len(sort.spaces)))
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**32))
    for point, worth in tried:
        named = {f"{point.space}/{name}": value for name, value in point.values.items()}
        of = {name: spaces[name] for name in named}
        study.add_trial(optuna.trial.create_trial(
            params={"space": point.space, **{
                # Three digits of an end may lie beyond it.
                name: min(max(float(value), of[name].low), of[name].high)
                if isinstance(of[name], optuna.distributions.FloatDistribution) else value
                for name, value in named.items()}},
            distributions={"space": which, **of}, value=worth))
    trial = study.ask()
    index = trial.suggest_categorical("space", which.choices)
    return Point(index, {
        name: number(trial.suggest_float(f"{index}/{name}", choice.low, choice.high, log=True))
        if isinstance(choice, Range) else trial.suggest_categorical(f"{index}/{name}", choice)
        for name, choice in sort.spaces[index].items()})


SAMPLERS: dict[str, Sampler] = {"random": random_point, "tpe": tpe_point}


def next_point(sampler: Sampler, sort: Sort, tried: Sequence[Tried], seed: int) -> Point | None:
    """A point that was not tried yet: of the seed and what was tried, a function; None where none is found."""
    known = {point.text for point, _ in tried}
    for redraw in range(REDRAWS):
        point = sampler(sort, tried, stream_seed(seed, f"{sort.name}/{len(tried)}/{redraw}"))
        if point.text not in known:
            return point
    return None


def read_sorts(path: str) -> tuple[Sort, ...]:
    """The sorts of a JSON file: {name: {setting: [text, …] or {"from": 1e-5, "to": 1e-3}}, or a list of these}.

    Raises:
      FieldError: the file is not of this form; names the sort and the setting.
      FileNotFoundError: there is no such file.
    """
    found = read_json_object(Path(path))
    require(bool(found), "sorts_file", path, "at least one sort of attack")
    sorts = []
    for name, value in found.items():
        spaces = value if isinstance(value, list) else [value]
        require(bool(spaces), "sorts_file", value, f"settings of {name!r} in {path}")
        sorts.append(Sort(name, tuple(_read_space(f"{path}: {name}", space) for space in spaces)))
    return tuple(sorts)


def _read_space(where: str, space: Any) -> dict[str, Choice]:
    require(isinstance(space, dict), "sorts_file", space, f"an object of settings in {where}")
    return {name: _read_choice(f"{where}: {name}", choice) for name, choice in space.items()}


def _read_choice(where: str, choice: Any) -> Choice:
    if isinstance(choice, list) and choice and all(isinstance(text, str) for text in choice):
        return tuple(choice)
    if isinstance(choice, dict) and set(choice) == {"from", "to"}:
        ends = tuple(choice[end] for end in ("from", "to"))
        if all(isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in ends) \
                and 0 < ends[0] < ends[1]:
            return Range(*map(float, ends))
    raise FieldError("sorts_file", f'{where}: found {choice!r}, expected a list of texts or {{"from": …, "to": …}}, '
                     "0 < from < to")
