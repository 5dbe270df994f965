"""What an evaluation writes of a task."""

from typing import Any

from jaxvaccine.evaluation import TaskResult


def summary(result: TaskResult) -> dict[str, Any]:
    """A task's result as JSON values."""
    found = {"score": result.score, "interval": list(result.interval), "n": result.n, "empty": result.empty,
             **result.details}
    if result.lenient:
        found["lenient_interval"] = list(result.lenient.interval)
    if result.plus:
        found |= {"plus": result.plus.score, "plus_interval": list(result.plus.interval)}
    if result.no_answer is not None:
        found["no_answer"] = result.no_answer
    if result.unread:
        found |= {"unread": result.unread, "unseen": result.unseen}
        if result.bounds:
            found["bounds"] = list(result.bounds)
    if result.cut:
        found["cut"] = result.cut
    if result.categories:
        found["categories"] = {name: {**rate._asdict(), "interval": list(rate.interval)}
                               for name, rate in result.categories.items()}
    if result.flagged:
        found["flagged"] = dict(result.flagged)
    return found
