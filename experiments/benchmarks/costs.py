"""What a traced function costs: matrix products, and passes through the layers, counted in its jaxpr.

XLA's own cost analysis counts the body of a loop once, however often it runs; the layers are a loop. This file alone
reads the insides of a jaxpr, of which JAX promises little: names of primitives, shapes and few parameters, those alike
in JAX 0.10 and 0.12.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Cost(NamedTuple):
    """Of what always runs; costs add up."""

    flops: float = 0.0  # of matrix products, 2 for a multiplication and an addition
    forward: int = 0  # loops over the layers from the first to the last
    backward: int = 0  # and from the last to the first

    def __add__(self, other: "Cost") -> "Cost":  # of a tuple it would be concatenation
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def repeated(self, times: int) -> "Cost":
        return Cost(*(times * value for value in self))


def count(fn, *args, layers: int, share_of_blocks: float = 1.0) -> tuple[Cost, Cost]:
    """(cost of every call, cost of what a call adds where a branch on the schedule falls due).

    Args:
      fn: traced with `args`, which may be ShapeDtypeStructs.
      layers: length of a loop over layers.
      share_of_blocks: how many of the loss's blocks of positions have any that is supervised; branches inside of a loop
        are taken that often, since what they skip are blocks without.
    """
    return _count(live_jaxpr(fn, *args), layers, share_of_blocks, in_loop=False)


def live_jaxpr(fn, *args):
    """fn(*args) traced, without what its results do not depend on: what XLA will compute."""
    from jax.interpreters import partial_eval

    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def inner_jaxprs(equation) -> Iterator[Any]:
    """The jaxprs among an equation's parameters: of a loop's body, a branch, a compiled function."""
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, tuple | list) else [parameter]:
            jaxpr = getattr(value, "jaxpr", value)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def _count(jaxpr, layers: int, share: float, in_loop: bool) -> tuple[Cost, Cost]:
    always, due = Cost(), Cost()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            always += Cost(flops=_product_flops(equation))
            continue
        inner = [_count(j, layers, share, in_loop or name in ("scan", "while")) for j in inner_jaxprs(equation)]
        if not inner:
            continue
        if name == "cond":
            dearest = max(inner, key=lambda costs: costs[0].flops + costs[1].flops)
            total = dearest[0] + dearest[1]
            if in_loop:
                always += total._replace(flops=share * total.flops)
            elif any(_reads_nothing(jaxpr) for jaxpr in inner_jaxprs(equation)):
                always += total
            else:
                due += total
            continue
        times = equation.params["length"] if name == "scan" else 1
        for a, d in inner:
            always += a.repeated(times)
            due += d.repeated(times)
        if name == "scan" and times == layers and inner[0][0].flops and _is_pass(equation):
            always += Cost(**{"backward" if equation.params["reverse"] else "forward": 1})
    return always, due


def _reads_nothing(jaxpr) -> bool:
    """Whether a branch is there for what is NaN already, as that of `defenses.base.after`; the schedule's hand on."""
    read = [v for equation in jaxpr.eqns for v in equation.invars] + list(jaxpr.outvars)
    return not any(v is given for v in read for given in jaxpr.invars)


def _is_pass(scan) -> bool:
    """A loop whose steps hand something on, as layers do; not over a loss's blocks, nor over layers side by side."""
    body, = inner_jaxprs(scan)
    # What is handed on leaves the loop in the shape in which it leaves the body; anything else is stacked.
    hands_on = any(out.aval.shape == step.aval.shape for out, step in zip(scan.outvars, body.outvars, strict=True))
    return hands_on and not _has_branch(scan)


def _has_branch(equation) -> bool:
    return equation.primitive.name == "cond" or any(
        _has_branch(e) for jaxpr in inner_jaxprs(equation) for e in jaxpr.eqns)


def _product_flops(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
