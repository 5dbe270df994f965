"""Plans: which backbones, methods, attacks and seeds an experiment goes through; the papers' grids as plans.

A method is a defense, followed by what differs from the settings of an alignment: `booster:lam=0.2:steps=400`; after a
+ stands the provider's defense while fine-tuning, with its own: `sft+lisa:lisa_rho=0.1`. An attack is what differs from
the settings of an attack: `poison_ratio=0.1:adapter=new`. + also separates the items of a list:
`targets=q_proj+v_proj`.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxvaccine import data
from jaxvaccine.experiment.align import AlignConfig, AlignmentData
from jaxvaccine.experiment.attack_config import AttackConfig, goes_on
from jaxvaccine.experiment.config import FieldError, flat, make, parse, require
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.methods import ALIGNMENT, FINE_TUNING
from jaxvaccine.experiment.objectives import OBJECTIVES, Plain
from jaxvaccine.experiment.parts import AS_ALIGNED, COMPUTED
from jaxvaccine.experiment.recipes import METHODS as METHODS_OF_PAPERS
from jaxvaccine.experiment.recipes import WORLD_ALIGN, WORLD_ATTACK
from jaxvaccine.experiment.results import Cell

ALIGNED = "aligned"
AS_IT_COMES = "none"  # the method of a backbone that nothing was done to
METHODS = ("sft", "vaccine", "t_vaccine", "booster")
ATTACK = "poison_ratio=0.1"
WORLD_EPOCHS = WORLD_ATTACK["steps"] * WORLD_ATTACK["batch_size"] / WORLD_ATTACK["n"]
# What a plan's cells set themselves, and a method or attack may not.
_OF_THE_PLAN = ("run_dir", "model", "seed", "overwrite", "progress", "aligned", "start", "test_data", "prompt",
                "system_prompt", "supervise", "data_protocol", "bad_rows", "revision")


@dataclasses.dataclass(frozen=True)
class Plan:
    """backbones × (method, attack) pairs × seeds. An attack "" is none: the model is aligned and scored alone.

    score_steps: attack steps after which a model is scored too, where seeds are trained at once; the last one always
    is.
    """

    backbones: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...] = (0,)
    score_steps: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("backbones", "pairs", "seeds"):
            values = getattr(self, name)
            require(bool(values), name, values, "at least one")
            require(len(set(values)) == len(values), name, values, "each once")

    @classmethod
    def product(cls, backbones: Sequence[str], methods: Sequence[str], attacks: Sequence[str], seeds: Sequence[int],
                score_steps: Sequence[int] = ()) -> "Plan":
        """Every method under every attack."""
        require(bool(methods), "defenses", methods, "at least one")
        require(bool(attacks), "attacks", attacks, "at least one")
        return cls(tuple(backbones), tuple((m, a) for m in methods for a in attacks), tuple(seeds), tuple(score_steps))

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(method for method, _ in self.pairs))

    @property
    def attacks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(attack for _, attack in self.pairs))

    def of_method(self, method: str) -> tuple[str, ...]:
        """The attacks on a method, but none."""
        return tuple(attack for name, attack in self.pairs if name == method and attack)


class Settings(NamedTuple):
    """What the cells of a plan start from: flat values, by the alignment's defense, or by a method's text where that
    has its own ("booster:base_defense=vaccine"); and how all are scored. paper: whose recipe it is, "" of none."""

    align: Mapping[str, Mapping[str, Any]]
    attack: Mapping[str, Mapping[str, Any]]
    scores: EvaluateConfig
    new_adapter: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # of the attack, where it trains a new adapter
    paper: str = ""
    own_task: bool = False  # of FA, an attacked model is scored on the user's own task alone, where that has a test
    by_category: bool = False  # every kind of harm or sort of request that a test tells apart has rows of its own

    def of_method(self, method: str) -> str:
        """The key of what a method starts from: of those that say nothing else than it, the one that says most.

        Raises:
          FieldError: the text is no method, or there is nothing that it starts from.
        """
        said = _said(method)
        keys = [key for key in self.align if _said(key) <= said]
        require(bool(keys), "defenses", method, f"one of {', '.join(self.align)}")
        return max(keys, key=lambda key: len(_said(key)))

    def in_paper(self, method: str) -> str:
        """What the paper's recipe calls what a method starts from; "" without a paper."""
        of_paper = {text: name for name, text in METHODS_OF_PAPERS.get(self.paper, {}).items()}
        return of_paper[self.of_method(method)] if of_paper else ""

    @classmethod
    def same(cls, align: Mapping[str, Any], attack: Mapping[str, Any], scores: EvaluateConfig) -> "Settings":
        """The same for every defense."""
        return cls(dict.fromkeys(ALIGNMENT, align), dict.fromkeys(ALIGNMENT, attack), scores)


def folder_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text.strip("/"))


def split_method(method: str) -> tuple[str, str]:
    """(of the alignment, of the fine-tuning or "")."""
    aligned, *tuning = re.split(rf"\+(?=(?:{'|'.join(FINE_TUNING)})(?::|$))", method, maxsplit=1)
    return aligned, tuning[0] if tuning else ""


def align_folder(root: Path, cell: Cell) -> Path:
    """Of the alignment's run: methods that differ in the fine-tuning alone share it."""
    return attack_folder(root, cell._replace(method=split_method(cell.method)[0], attack=ALIGNED))


def attack_folder(root: Path, cell: Cell) -> Path:
    """Of the attack's run; of the aligned model's results, if there is none."""
    return root / folder_name(cell.backbone) / folder_name(cell.method) / f"seed{cell.seed}" / folder_name(cell.attack)


def _changes(config_class: type, text: str, name: str, first: str = "", own: Sequence[str] = ()) -> dict[str, Any]:
    """The values of "name=value:name=value"; `first` names the field of a leading bare value, `own` what it may set
    itself though plans do."""
    if not text:
        return {}
    items = re.split(r":(?=\w+=)", text)  # a value may have colons of its own, such as a slice of the data
    if first and "=" not in items[0]:
        items[0] = f"{first}={items[0]}"
    try:
        pairs = dict(item.split("=", 1) if "=" in item else (item, "") for item in items)
        for field in pairs:
            if field in _OF_THE_PLAN and field not in own:
                raise FieldError(field, f"found {pairs[field]!r}, expected nothing: the plan sets it")
        return parse(config_class, pairs)
    except FieldError as error:
        raise FieldError(name, f"found {text!r}: {error}") from error


@functools.cache
def _said(method: str) -> frozenset[tuple[type, str, Any]]:
    """All that a method's text says, in any order."""
    parts = zip((AlignConfig, AttackConfig), split_method(method), strict=True)
    return frozenset((config_class, *item) for config_class, text in parts
                     for item in _changes(config_class, text, "defenses", "defense").items())


@contextlib.contextmanager
def _named(name: str, text: str, given: Mapping[str, Any], prefix: str = "") -> Iterator[None]:
    """Errors name the text that they come from, or the flag, if what is wrong is what all cells start from."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, FieldError) and error.name not in given:
            raise FieldError(prefix + error.name, error.message) from error
        raise FieldError(name, f"found {text!r}: {error}") from error


def attack_values(attack: str) -> dict[str, Any]:
    """The flat values that an attack's text gives.

    Raises:
      FieldError: it is none.
    """
    values = _changes(AttackConfig, attack, "attacks", own=("prompt", "system_prompt"))
    return {name: value for name, value in values.items() if (name, value) != ("prompt", AS_ALIGNED)}


@contextlib.contextmanager
def errors_of_attack(attack: str) -> Iterator[None]:
    """Errors of a config that an attack's text has made name the text, or the flag of the plan."""
    with _named("attacks", attack, attack_values(attack), "attack_"):
        yield


def cell_configs(settings: Settings, root: Path, cell: Cell) -> tuple[AlignConfig, AttackConfig | None]:
    """The two runs of a cell; one alone, if its attack is "".

    Raises:
      FieldError: a method or an attack that is not valid; names it, and what of it.
    """
    aligned_text, tuning_text = split_method(cell.method)
    method = _changes(AlignConfig, aligned_text, "defenses", "defense")
    tuning = _changes(AttackConfig, tuning_text, "defenses", "defense")
    changed = attack_values(cell.attack) | tuning
    require("defense" in method, "defenses", cell.method, "a defense first")
    defense, key = method["defense"], settings.of_method(cell.method)
    shared = {"seed": cell.seed, "overwrite": False, "progress": settings.scores.run.progress}
    folder = align_folder(root, cell)
    with _named("defenses", cell.method, method):
        aligned = make(AlignConfig, method, {
            **settings.align[key], **shared, "model": cell.backbone, "run_dir": str(folder), "defense": defense})
    if not cell.attack:
        return aligned, None
    with _named("attacks", cell.attack, changed, "attack_"):
        asked = {**settings.attack[key], **changed}
        objective = OBJECTIVES.get(asked.get("objective", "plain"), Plain)
        aligning = "defense" in changed or objective.takes_fisher
        continued = goes_on(asked.get("adapter", "auto"), defense, asked.get("defense", "none"))
        attacked = make(AttackConfig, changed, {
            **({} if continued else settings.new_adapter.get(key, {})), **settings.attack[key], **shared,
            "aligned": str(folder), "run_dir": str(attack_folder(root, cell)),
            "test_data": settings.scores.tests.forbidden, "save_every": aligned.run.save_every,
            "alignment_data": asked.get("alignment_data") or aligned.data.alignment_data if aligning else "",
            **{name: getattr(aligned.model, name) for name in ("dtype", *COMPUTED)},
            **_data_of(aligned.data, changed.get("prompt", aligned.data.prompt))})
        # A table's p is what was trained.
        data.check_whole(attacked.data.n, attacked.data.poison_ratio)
        # Found here what a continued adapter can't have.
        attacked.adapter.resolve(flat(aligned), attacked.method, attacked.ablation)
    return aligned, attacked


def _data_of(aligned: AlignmentData, prompt: str) -> dict[str, Any]:
    """What an attack with this prompt has of the alignment's data; a system prompt is of the alignment's chat."""
    names = ["bucket", "prompt", "supervise", "data_protocol", "bad_rows"]
    names += ["system_prompt"] * (prompt == aligned.prompt)
    return {name: getattr(aligned, name) for name in names}


class Point(NamedTuple):
    """A cell pair, and its place on the x axis of a panel."""

    x: str  # a number as text, or a name
    method: str
    attack: str = ATTACK


class Panel(NamedTuple):
    """A figure: curves of points over x; without an xlabel, an ablation, whose points have names."""

    title: str
    xlabel: str
    curves: Mapping[str, Sequence[Point]]


def pairs(panels: Iterable[Panel]) -> tuple[tuple[str, str], ...]:
    """The (method, attack) pairs of all points, each once, those of a method together."""
    found = dict.fromkeys((point.method, point.attack) for panel in panels for curve in panel.curves.values()
                          for point in curve)
    methods = dict.fromkeys(method for method, _ in found)
    return tuple(pair for method in methods for pair in found if pair[0] == method)


def ratios(methods: Sequence[str], values: Sequence[str] = ("0", "0.05", "0.1", "0.15", "0.2")) -> list[Panel]:
    """HS and FA over the ratio p of harmful data (both papers' main tables)."""
    return [Panel("Ratio of harmful data", "p", {
        method: [Point(p, method, f"poison_ratio={p}") for p in values] for method in methods})]


def samples(methods: Sequence[str], values: Sequence[str] = ("100", "500", "1000", "1500", "2000"),
            more: str = f":steps=0:epochs={WORLD_EPOCHS:g}:user_data=world_rating@attack+world_rating@more"
            ) -> list[Panel]:
    """HS and FA over the number n of the user's examples, for as many epochs each (both papers' main tables).

    more: what else the attacks have in common; by default the small world's, with user's data enough for all.
    """
    return [Panel("Size of the user's data, all for as many epochs", "n", {
        method: [Point(n, method, f"{ATTACK}:n={n}{more}") for n in values] for method in methods})]


def over(title: str, name: str, values: Sequence[str], methods: Sequence[str],
         defaults: Mapping[str, object] = WORLD_ALIGN) -> Panel:
    """A setting of the alignment. The value that is its default is not written, and so shares other panels' cells."""
    return Panel(title, name, {
        method: [Point(value, method if value == str(defaults[name]) else f"{method}:{name}={value}")
                 for value in values] for method in methods})


def sensitivity(methods: Sequence[str]) -> list[Panel]:
    """The methods' own settings, and those of the alignment; the methods are given."""
    del methods
    vaccines = ("vaccine", "t_vaccine")
    total = WORLD_ALIGN["harmful_data"].rpartition("[0:")[2].removesuffix("]")
    source = WORLD_ALIGN["harmful_data"].rpartition("[")[0]
    harmful = Panel("Booster: harmful examples", "number of harmful examples", {"booster": [
        Point(count, "booster" if count == total else f"booster:harmful_data={source}[0:{count}]")
        for count in ("20", "60", "200", total)]})
    return [
        over("Vaccine, T-Vaccine: norm of the perturbation", "rho", ("0.5", "1.5", "5.0", "15", "50"), vaccines),
        over("T-Vaccine: active layers S of 6", "layers", ("1", "2", "3", "6"), ("t_vaccine",)),
        over("T-Vaccine: steps J between draws", "sample_every", ("5", "20", "150"), ("t_vaccine",)),
        over("T-Vaccine: steps K between probes", "probe_every", ("5", "20", "150"), ("t_vaccine",)),
        over("Booster: weight of the regularizer", "lam", ("0.05", "0.1", "0.2", "0.4", "0.8"), ("booster",)),
        over("Booster: length of the simulated step", "alpha", ("0.01", "0.03", "0.1", "0.3"), ("booster",)),
        harmful,
        over("Alignment steps", "steps", ("150", "300"), ("sft", *vaccines)),
        over("LoRA rank", "rank", ("8", "32"), ("sft", "booster")),
        Panel("Projections with an adapter", "", {
            method: [Point("q, k, v", f"{method}:targets=q_proj+k_proj+v_proj"), Point("all", method)]
            for method in ("sft", *vaccines)})]


def ablations(methods: Sequence[str]) -> list[Panel]:
    """What each part of the methods is good for."""
    del methods
    random = "t_vaccine:importance=uniform"
    return [
        Panel("T-Vaccine", "", {"t_vaccine": [
            Point("T-Vaccine", "t_vaccine"), Point("the most probable layers", "t_vaccine:draw=top"),
            Point("uniform probabilities", random),
            Point("random layers, once", f"{random}:sample_every={WORLD_ALIGN['steps']}"),
            Point("alignment gradient", "t_vaccine:importance=alignment"),
            Point("Gaussian perturbation", "t_vaccine:direction=gaussian"),
            Point("no perturbation", "t_vaccine:rho=0")]}),
        Panel("Vaccine", "", {"vaccine": [
            Point("Vaccine", "vaccine"), Point("Gaussian perturbation", "vaccine:direction=gaussian"),
            Point("no perturbation (SFT)", "sft")]}),
        Panel("Booster", "", {"booster": [
            Point("Booster", "booster"), Point("no regularizer (lam = 0)", "booster:lam=0"),
            Point("on Vaccine", "booster:base_defense=vaccine"),
            Point("on T-Vaccine", "booster:base_defense=t_vaccine")]})]


class Grid(NamedTuple):
    """A named plan of panels."""

    title: str
    panels: Callable[[Sequence[str]], list[Panel]]  # of the methods that are compared


GRIDS = {
    "ratios": Grid("HS and FA over the ratio of harmful data", ratios),
    "samples": Grid("HS and FA over the size of the user's data", samples),
    "sensitivity": Grid("Settings of the alignment", sensitivity),
    "ablations": Grid("What the parts of the methods are good for", ablations),
}
