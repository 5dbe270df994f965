"""Defenses tuned: the same number of settings tried for every one against the usual attack, before attacks are searched
for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxvaccine.experiment.config import flat
from jaxvaccine.experiment.plans import cell_configs, folder_name, split_method
from jaxvaccine.experiment.results import Cell
from jaxvaccine.experiment.search import USUAL, Search, along, carry_out_attacks
from jaxvaccine.experiment.spaces import Point, Range, Sort, Tried, next_point, random_point
from jaxvaccine.experiment.strength import Scored, floors, lost
from jaxvaccine.json_files import read_json_object, write_json

# What is tuned of a method, from 1 / FACTOR of what it starts from to FACTOR times that.
TUNED: dict[str, tuple[str, ...]] = {
    "sft": ("learning_rate",), "vaccine": ("rho",), "t_vaccine": ("rho",), "booster": ("lam", "alpha"),
    "repnoise": ("ascent_weight", "noise_weight"), "tar": ("inner_learning_rate", "tamper_weight"),
    "lisa": ("lisa_rho",), "ewc": ("ewc_lam",), "kl": ("kl_lam",)}
FACTOR = 4.0
FOLDER = "tuning"


class Tuned(NamedTuple):
    """A setting of a defense: the method's text, and its mean HS along the usual attack in percent; None where it
    costs the aligned model or the user's task more than may be lost, or came to no end."""

    method: str
    harm: float | None


def space_of(search: Search, method: str) -> Sort:
    """What is tuned of a method: of the provider's while fine-tuning where it has one, else of the alignment's."""
    aligned, tuning = split_method(method)
    configs = cell_configs(search.settings, search.root, Cell(search.backbones[0], method, USUAL, 0))
    values = flat(configs[1] if tuning else configs[0])
    names = [name for name in TUNED[(tuning or aligned).partition(":")[0]] if values[name] > 0]
    return Sort(method, ({name: Range(values[name] / FACTOR, values[name] * FACTOR) for name in names},))


def tune(search: Search, method: str, trials: int) -> str:
    """The best of a method's settings and of `trials` others: the text of that method.

    The best has the least HS along the usual attack, averaged over the steps that were scored and the search's seeds,
    of those whose aligned model and user's task have lost no more against the method as it is than an attack may.
    """
    path = Path(search.root) / FOLDER / f"{folder_name(method)}.json"
    found = read_tuned(path)
    sort, tried = space_of(search, method), [Tried(Point(0, {}), 0.0)]
    usual = _measure(search, method)
    found.setdefault(method, Tuned(method, _harm(search, usual, usual)))
    for _ in range(trials):
        point = next_point(random_point, sort, tried, search.search_seeds[0])
        tried.append(Tried(point, 0.0))
        text = f"{method}:{point.text}"
        if text not in found:
            found[text] = Tuned(text, _harm(search, _measure(search, text), usual))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {of.method: of.harm for of in found.values()})
    known = [found[method], *(found[f"{method}:{of.point.text}"] for of in tried[1:])]
    return min((of for of in known if of.harm is not None), key=lambda of: of.harm, default=found[method]).method


def read_tuned(path: Path) -> dict[str, Tuned]:
    """{text: setting} of the file of a method's tuning; nothing if there is none."""
    return {text: Tuned(text, harm) for text, harm in read_json_object(path).items()} if path.exists() else {}


def _measure(search: Search, method: str) -> Mapping[int, Sequence[Scored]] | None:
    """{seed: the aligned model, and the attacked one after every scored step}; None if a run came to no end."""
    if carry_out_attacks(search, method, [USUAL], search.backbones[:1], search.search_seeds):
        return None
    cells = {seed: Cell(search.backbones[0], method, USUAL, seed) for seed in search.search_seeds}
    return {seed: (along(search, cell._replace(attack=""))[-1], *along(search, cell)) for seed, cell in cells.items()}


def _harm(search: Search, found: Mapping[int, Sequence[Scored]] | None, usual: Mapping[int, Sequence[Scored]] | None
          ) -> float | None:
    if found is None or usual is None:
        return None
    means = []
    for seed, (aligned, *attacked) in found.items():
        for of, reference in ((aligned, usual[seed][0]), (attacked[-1], usual[seed][-1])):
            if lost(of, floors(reference, None, search.part.loss)) > 0:
                return None
        means.append(sum(of.harm for of in attacked) / len(attacked))
    return sum(means) / len(means)
