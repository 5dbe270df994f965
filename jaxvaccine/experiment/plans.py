"""What a plan's figures are made of."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A (method, attack) pair and its place on the x axis: a number as text, or a name."""

    x: str
    method: str
    attack: str


class Panel(NamedTuple):
    """Curves of points. An xlabel of "" is an ablation: its points have names."""

    title: str
    xlabel: str
    curves: Mapping[str, Sequence[Point]]
