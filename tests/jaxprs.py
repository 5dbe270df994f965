"""Looking into a jaxpr and all that lie inside it."""

from experiments.benchmarks.costs import inner_jaxprs, live_jaxpr


def equations(jaxpr):
    """Every equation of a (closed) jaxpr and, recursively, of the jaxprs among their parameters."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)


def live_equations(fn, *args):
    """The equations of fn(*args) that its results depend on."""
    return equations(live_jaxpr(fn, *args))


def output_shapes(equations):
    return [variable.aval.shape for equation in equations for variable in equation.outvars]
