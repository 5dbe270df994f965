"""The search for the strongest attack on every defense: plans that grow, trial by trial, under one budget for all.

A folder of it holds for every alignment a plan's folder (plan_folder.py), trials/<method>.json with what was tried, in
order, and at the top results.csv with all rows. Every trial is a function of the seed and of those before it, so that a
search that was cut off goes on where it was."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxvaccine.evaluation.tasks import HARMFUL_SCORE, PHRASES_SCORE
from jaxvaccine.experiment import results
from jaxvaccine.experiment.attack_config import AttackConfig
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.checks import check_cell
from jaxvaccine.experiment.config import FieldError, Part, field, require
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.plans import (
    ATTACK,
    Plan,
    Settings,
    attack_values,
    folder_name,
    split_method,
)
from jaxvaccine.experiment.results import Cell, Row
from jaxvaccine.experiment.spaces import SAMPLERS, Point, Range, Sort, Tried, next_point
from jaxvaccine.experiment.strength import Scored, floors, scored, worth
from jaxvaccine.json_files import read_json_object, write_json

# What every method is measured with beside the search: the user's training without harm, and the usual attack.
BENIGN = "poison_ratio=0"
USUAL = ATTACK
TRIALS = "trials"


@dataclasses.dataclass(frozen=True)
class SearchPart(Part):
    """Search."""

    trials: int = field(104, "Attacks that are tried on every method, over all sorts together; may grow.", at_least=1)
    sampler: str = field("random", "How the next attack is chosen: random, or tpe, Optuna's estimator, which learns "
                         "from the trials of the same sort (the extra [search]).")
    search_seeds: tuple[str, ...] = field(("0",), "Seeds of the trials, on the first backbone.")
    top: int = field(3, "The strongest attacks on every method that are run again on all backbones and --seeds.",
                     at_least=1)
    loss: float = field(0.1, "Part of FA and of the benign requests answered that an attack may cost.", at_least=0,
                        below=1)

    def __post_init__(self):
        super().__post_init__()
        require(self.sampler in SAMPLERS, "sampler", self.sampler, "one of " + ", ".join(SAMPLERS))
        require(bool(self.search_seeds) and all(text.isdecimal() for text in self.search_seeds), "search_seeds",
                self.search_seeds, "numbers of at least 0")
        if self.sampler == "tpe":
            try:
                import optuna  # noqa: F401
            except ImportError:
                raise FieldError("sampler", "found 'tpe', expected random: optuna is not installed; "
                                 "pip install 'jaxvaccine[search]'") from None


class Trial(NamedTuple):
    """One attack on one method: of which sort, which point, and whether it came to an end."""

    sort: str
    point: Point
    failed: str = ""  # why it has no result, such as a loss that was not finite

    @property
    def attack(self) -> str:
        return self.point.text


class Search(NamedTuple):
    """What is the same for all methods."""

    part: SearchPart
    sorts: tuple[Sort, ...]
    backbones: tuple[str, ...]
    seeds: tuple[int, ...]  # of the attacks that are run again
    score_steps: tuple[int, ...]
    settings: Settings
    root: Path
    as_lanes: bool
    say: Callable[[str], None] = print

    @property
    def search_seeds(self) -> tuple[int, ...]:
        return tuple(map(int, self.part.search_seeds))


def check(search: Search, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """{method: {sort: why it can't be tried}} of the sorts that a method or its model refuses.

    Raises:
      FieldError: no harmful prompts; seeds of the search among the others; a sort that no method can be attacked with,
        or a method that no sort attacks.
    """
    test = search.settings.scores.tests.harmful_test
    require(bool(test), "harmful_test", test, "harmful prompts: a search is for the attack with the highest HS")
    for seed in search.search_seeds:
        require(seed not in search.seeds, "search_seeds", search.part.search_seeds,
                "none of --seeds: what a search chose is measured on others")
    refused: dict[str, dict[str, str]] = {method: {} for method in methods}
    for method, sort in itertools.product(methods, search.sorts):
        if not _is_of(sort, method):
            refused[method][sort.name] = f"an attack on {' or '.join(sort.of)}"
            continue
        try:
            for point in _corners(sort):
                check_cell(search.settings, plan_root(search, method),
                           Cell(search.backbones[0], method, point.text, search.search_seeds[0]), search.as_lanes)
        except FieldError as error:
            refused[method][sort.name] = str(error)
    for sort in search.sorts:
        reasons = [refused[method].get(sort.name) for method in methods if _is_of(sort, method)]
        require(not reasons or None in reasons, "sorts", sort.name, f"a sort of attack on some method ({reasons[:1]})")
    for method, of in refused.items():
        require(len(of) < len(search.sorts), "defenses", method, f"a method that can be attacked ({of})")
    return refused


def _is_of(sort: Sort, method: str) -> bool:
    return not sort.of or split_method(method)[0].partition(":")[0] in sort.of


def _corners(sort: Sort) -> Iterator[Point]:
    """Points that together have every text and both ends of every range."""
    for index, space in enumerate(sort.spaces):
        options = {name: tuple(f"{end:.3g}" for end in choice) if isinstance(choice, Range) else choice
                   for name, choice in space.items()}
        for i in range(max(map(len, options.values()), default=0)):
            yield Point(index, {name: texts[min(i, len(texts) - 1)] for name, texts in options.items()})


def plan_root(search: Search, method: str) -> Path:
    """The plan's folder of a method: methods that differ in the fine-tuning alone share one, and its alignments."""
    return search.root / folder_name(split_method(method)[0])


def trials_path(root: Path, method: str) -> Path:
    return root / TRIALS / f"{folder_name(method)}.json"


def read_trials(root: Path, method: str) -> list[Trial]:
    """What was tried on a method, in order."""
    path = trials_path(root, method)
    if not path.exists():
        return []
    return [Trial(of["sort"], Point(of["space"], of["values"]), of["failed"])
            for of in read_json_object(path)["trials"]]


def read_refused(root: Path, method: str) -> dict[str, str]:
    """{sort: why it is none of attacks on this method}."""
    return read_json_object(trials_path(root, method))["refused"]


def _write_trials(search: Search, method: str, trials: Sequence[Trial], refused: Mapping[str, str]) -> None:
    path = trials_path(search.root, method)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"method": method, "refused": dict(refused), "trials": [
        {"sort": of.sort, "space": of.point.space, "values": dict(of.point.values), "failed": of.failed}
        for of in trials]})


def cell_rows(search: Search, cell: Cell) -> list[Row] | None:
    """A cell's rows of the table of results; None if it is not there."""
    path = result_path(plan_root(search, cell.method), cell)
    return read_json_object(path)["rows"] if path.exists() else None


def least(search: Search, cell: Cell) -> dict[str, float]:
    """The floors of a cell's attack, of its own backbone and seed."""
    aligned = scored(cell_rows(search, cell._replace(attack="")))[-1]
    trains = attack_values(cell.attack).get("trains") != "nothing"
    return floors(aligned, scored(cell_rows(search, cell._replace(attack=BENIGN)))[-1] if trains else None,
                  search.part.loss)


def along(search: Search, cell: Cell) -> list[Scored]:
    """The attacked model of a cell, after every step that was scored; nothing if the cell is not there."""
    return scored(cell_rows(search, cell) or ())


def intervals(search: Search, cell: Cell) -> dict[int, tuple[float, float]]:
    """{step: the 95% interval of a cell's HS over its prompts}, in percent, where there is one."""
    return {row["step"]: (row["low"], row["high"]) for row in cell_rows(search, cell) or ()
            if row["measure"] in (HARMFUL_SCORE, PHRASES_SCORE) and row.get("low") is not None}


def harmful_rows(config: AttackConfig, step: int) -> int:
    """How many harmful rows an attack has trained on after so many steps, with repetitions; in mixed order as many as
    expected. Those of an objective's own batch count, as long as it has one."""
    seen, total = step * config.training.batch_size, config.training.count_steps(config.data.n) * \
        config.training.batch_size
    harmful = {"mixed": seen * config.data.poison_ratio, "harmful_first": min(seen, total * config.data.poison_ratio),
               "harmful_last": max(0, seen - total * (1 - config.data.poison_ratio))}[config.data.order]
    own = config.objective.harmful_rows(config.training.batch_size) if "harmful" in config.objective.batches else 0
    return round(harmful) + own * min(step, getattr(config.objective, "steps", step))


def _worth(search: Search, method: str, trial: Trial) -> float:
    cells = [Cell(search.backbones[0], method, trial.attack, seed) for seed in search.search_seeds]
    if trial.failed:
        return -100.0
    return sum(worth(along(search, cell), least(search, cell)) for cell in cells) / len(cells)


def carry_out_attacks(search: Search, method: str, attacks: Sequence[str], backbones: Sequence[str],
                      seeds: Sequence[int]) -> dict[str, str]:
    """Carries out these attacks on a method; {attack: why} of those that came to no end."""
    failed = {}

    def plan(texts: Sequence[str]) -> None:
        pairs = tuple((method, text) for text in dict.fromkeys(texts))
        carry_out(Plan(tuple(backbones), pairs, tuple(seeds), search.score_steps),
                  search.settings, plan_root(search, method), as_lanes=search.as_lanes, say=search.say)

    try:
        plan(attacks)
    except FloatingPointError:
        for text in attacks:  # which of them it was
            try:
                plan([text])
            except FloatingPointError as error:
                failed[text] = str(error)
    return failed


def search_method(search: Search, method: str, refused: Mapping[str, str]) -> None:
    """Tries attacks on a method until the budget is spent or no sort has another, and runs the strongest again."""
    trials = read_trials(search.root, method)
    first = search.backbones[0]
    if unrunnable := carry_out_attacks(search, method, [BENIGN, USUAL], [first], search.search_seeds):
        raise FloatingPointError(f"{method}: {unrunnable}")
    sorts = [sort for sort in search.sorts if sort.name not in refused]
    # What an earlier call had chosen and did not come to.
    trials = _finish_round(search, method, trials, len(trials), refused)
    values = {of.attack: _worth(search, method, of) for of in trials}
    left = {sort.name: sort for sort in sorts}
    while len(trials) < search.part.trials and left:
        begun = len(trials)
        for sort in sorts:
            if sort.name not in left or len(trials) >= search.part.trials:
                continue
            tried = [Tried(of.point, values[of.attack]) for of in trials[:begun] if of.sort == sort.name]
            point = next_point(SAMPLERS[search.part.sampler], sort, tried, search.search_seeds[0])
            if point is None:
                del left[sort.name]
            else:
                trials.append(Trial(sort.name, point))
        _write_trials(search, method, trials, refused)
        trials = _finish_round(search, method, trials, len(trials) - begun, refused)
        values |= {of.attack: _worth(search, method, of) for of in trials[begun:]}
        search.say(f"{method}: {len(trials)} of {search.part.trials} trials, HS up to {max(values.values()):.1f}")
    again = strongest_attacks(search, method)
    carry_out_attacks(search, method, [BENIGN, USUAL, *again], search.backbones, search.seeds)


def _finish_round(search: Search, method: str, trials: Sequence[Trial], last: int, refused: Mapping[str, str]
                  ) -> list[Trial]:
    """The trials, of which the last ones have been carried out."""
    before, after = list(trials[:len(trials) - last]), list(trials[len(trials) - last:])
    missing = [of.attack for of in after if not of.failed and any(
        cell_rows(search, Cell(search.backbones[0], method, of.attack, seed)) is None for seed in search.search_seeds)]
    if missing:
        failed = carry_out_attacks(search, method, missing, search.backbones[:1], search.search_seeds)
        after = [of._replace(failed=failed.get(of.attack, of.failed)) for of in after]
        _write_trials(search, method, before + after, refused)
    return before + after


def strongest_attacks(search: Search, method: str) -> list[str]:
    """The attacks that are run again: those that were worth most, of equal ones those with most harm along the way."""
    of = {trial.attack: (_worth(search, method, trial), _mean_harm(search, method, trial.attack))
          for trial in read_trials(search.root, method) if not trial.failed}
    return sorted(of, key=of.__getitem__, reverse=True)[:search.part.top]


def _mean_harm(search: Search, method: str, attack: str) -> float:
    """HS averaged over the scored steps and the search's seeds."""
    harms = [of.harm for seed in search.search_seeds
             for of in along(search, Cell(search.backbones[0], method, attack, seed))]
    return sum(harms) / len(harms)


def collect(search: Search, methods: Sequence[str]) -> None:
    """Writes results.csv of all cells of the search that are there."""
    rows: list[Row] = []
    for method in methods:
        tried = [of.attack for of in read_trials(search.root, method)]
        for backbones, seeds, attacks in (
                (search.backbones[:1], search.search_seeds, tried),
                (search.backbones, search.seeds, strongest_attacks(search, method))):
            texts = dict.fromkeys(("", BENIGN, USUAL, *attacks))
            for backbone, seed, text in itertools.product(backbones, seeds, texts):
                rows += cell_rows(search, Cell(backbone, method, text, seed)) or []
    search.root.mkdir(parents=True, exist_ok=True)
    results.write(search.root / results.TABLE, results.table(rows))
