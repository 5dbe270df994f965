"""A whole experiment from one config: which plan, what its cells start from, and carrying it out."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxvaccine import world
from jaxvaccine.experiment import carry_out as engine
from jaxvaccine.experiment import plans, recipes
from jaxvaccine.experiment.attack_config import split_new_adapter
from jaxvaccine.experiment.config import FieldError, Part, field, flat, make, require
from jaxvaccine.experiment.evaluate_config import EvaluateConfig
from jaxvaccine.experiment.methods import ALIGNMENT, FINE_TUNING
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.experiment.plans import GRIDS, METHODS, Plan, Settings
from jaxvaccine.experiment.results import Cell


@dataclasses.dataclass(frozen=True)
class PlanConfig(Part):
    """Plan."""

    run_dir: str = field("", "Folder of the whole experiment. Re-running carries out what is not there yet.")
    model: tuple[str, ...] = field(
        (world.NAME,), "Backbones: Hugging Face directories, hub ids or .gguf files; world is the small one that comes "
        "with the package.")
    defenses: tuple[str, ...] = field(
        METHODS, "Methods: a defense of the alignment, with what differs from the other flags, as booster:lam=0.2; "
        "after a +, one while fine-tuning, as sft+lisa. all: every one of the former, and SFT with every one of the "
        "latter; with a paper's recipe, and unless given there, those of its tables.")
    poison_ratios: tuple[str, ...] = field(("0", "0.1"), "Attacks: ratios of harmful data.")
    attacks: tuple[str, ...] = field(
        (), "Attacks, as what differs from the flags attack_…: poison_ratio=0.1:adapter=new. Instead of "
        "--poison_ratios.")
    seeds: tuple[str, ...] = field(("0",), "Seeds, of alignment and attack; everything is run for each.")
    plan: Literal["", "ratios", "samples", "sensitivity", "ablations"] = field(
        "", "A grid of the papers on the small world, instead of --defenses times attacks.")
    recipe: Literal["auto", "world", "agents", "booster", "t_vaccine", "none"] = field(
        "auto", "What stands for flags that are not given: the small world's settings and data, or those with tools, a "
        "paper's recipe for all of its methods, or neither; auto is world for --model=world and none for others.")
    protocol: Literal["released", "one_new", "one_continued"] = field(
        "released", "Of a paper's recipe: each method's own attack, as its authors' script has it, or one for all, "
        "that on the paper's own method, on a new adapter or on the aligned one.")
    lanes: bool = field(
        False, "Train all seeds of a setting at once, and score along the attack: for small models.")
    score_steps: tuple[str, ...] = field(
        ("20", "40", "60", "80", "100", "150", "200", "300", "400"), "--lanes: attack steps after which a model is "
        "scored; the last one always is.")
    score_base: bool = field(True, "Score the backbones as they come too.")
    by_category: bool = field(
        False, "HS of every kind of harm, and over-refusal of every sort of request, that a test tells apart, too.")
    overwrite: bool = field(False, "Delete an earlier experiment in --run_dir and start again.")
    progress: bool = field(True, "Draw progress bars.")

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        require(bool(self.model), "model", self.model, "at least one")
        for name in ("defenses", "poison_ratios", "attacks", "seeds", "model"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, values, "each once")
        for name in ("seeds", "score_steps"):
            values = getattr(self, name)
            require(bool(values) and all(v.isdecimal() for v in values), name, values, "numbers of at least 0")
        require(all(map(_is_ratio, self.poison_ratios)), "poison_ratios", self.poison_ratios, "numbers from 0 to 1")
        known = {*ALIGNMENT, "all"} if len(self.defenses) == 1 else set(ALIGNMENT)
        for method in self.defenses:
            aligned, tuning = plans.split_method(method)
            require(aligned.partition(":")[0] in known and (not tuning or aligned != "all"), "defenses", self.defenses,
                    f"all, or some of {', '.join(ALIGNMENT)}, each alone or with +{', +'.join(_tuning())}")

    @property
    def methods(self) -> tuple[str, ...]:
        """The defenses, with "all" written out: of a paper's recipe, those of its tables, also where none are named."""
        if self.recipe in recipes.METHODS and self.defenses in (("all",), METHODS):
            return tuple(recipes.METHODS[self.recipe].values())
        if self.defenses == ("all",):
            return (*ALIGNMENT, *(f"sft+{name}" for name in _tuning()))
        return self.defenses

    @property
    def on_world(self) -> bool:
        return self.recipe == "world" or (self.recipe == "auto" and self.model[0] == world.NAME)

    def panels(self) -> list[plans.Panel]:
        """Of a named plan; none of another."""
        return GRIDS[self.plan].panels(self.methods) if self.plan else []

    def make_plan(self) -> Plan:
        seeds, steps = tuple(map(int, self.seeds)), tuple(map(int, self.score_steps))
        if self.plan:
            return Plan(self.model, plans.pairs(self.panels()), seeds, steps)
        attacks = self.attacks or tuple(f"poison_ratio={ratio}" for ratio in self.poison_ratios)
        return Plan.product(self.model, self.methods, attacks, seeds, steps)


def _tuning() -> list[str]:
    return [name for name in FINE_TUNING if name != "none"]


def _is_ratio(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def make_settings(config: PlanConfig, align: Mapping[str, Any], attack: Mapping[str, Any], scores: Mapping[str, Any]
                  ) -> Settings:
    """What the plan's cells start from: the given flat values of the three stages, on the config's recipe.

    Raises:
      FieldError: a value that the evaluation refuses; a method that is not of the paper whose recipe is asked for, or
        an attack on another task than the other flags'.
    """
    paper = config.recipe if config.recipe in recipes.METHODS else ""
    require(bool(paper) or config.protocol == "released", "protocol", config.protocol, "--recipe of a paper beside it")
    of_align: Mapping[str, Mapping[str, Any]]
    of_attack: Mapping[str, Mapping[str, Any]]
    if paper:
        of_align, of_attack = _of_paper(config, align, attack)
        of_tests: Mapping[str, Any] = recipes.EVALUATION[paper]
    else:
        own_align, own_attack, of_tests = recipes.OWN.get("world" if config.on_world else config.recipe, ({}, {}, {}))
        of_align, of_attack = dict.fromkeys(ALIGNMENT, own_align), dict.fromkeys(ALIGNMENT, own_attack)
    of_align = {name: {**recipe, **align} for name, recipe in of_align.items()}
    shared = {name: value for name, value in of_align["sft"].items()
              if name in ("dtype", "max_length", "prompt", "system_prompt", "supervise", "data_protocol", "bad_rows",
                          "revision", "quantisation")}
    evaluated = make(EvaluateConfig, scores, {
        **of_tests, **shared, "model": config.model[0], "run_dir": config.run_dir, "progress": config.progress})
    parts = {name: split_new_adapter(recipe) for name, recipe in of_attack.items()}
    return Settings(of_align, {name: {**shared, **attack} for name, (shared, _) in parts.items()}, evaluated,
                    {name: new for name, (_, new) in parts.items()}, paper, by_category=config.by_category)


def _of_paper(config: PlanConfig, align: Mapping[str, Any], attack: Mapping[str, Any]
              ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Of all methods of the recipe's paper, by their texts, (of the alignment, of the attack on the user's task)."""
    paper, plan = config.recipe, config.make_plan()
    for method in plan.methods:
        defense = _defense(method)
        having = [name for name, methods in recipes.METHODS.items() if defense in map(_defense, methods.values())]
        require(paper in having, "recipe", paper, f"{' or '.join(having) or 'another'}: {paper}'s has no {defense}")
    harmful = recipes.harmful_of(align.get("harmful_data", ""), attack.get("harmful_data", ""))
    user_data = attack.get("user_data", "")
    task = recipes.task_of(paper, user_data)
    for text in plan.attacks:
        own = plans.attack_values(text).get("user_data", user_data)
        require(recipes.task_of(paper, own) == task, "attacks", text, f"{task} as of the other flags, since the attack "
                f"of {paper}'s recipe depends on the user's task: a plan for each")
    methods = recipes.METHODS[paper]
    return ({text: recipes.alignment(paper, name, harmful) for name, text in methods.items()},
            {text: recipes.attack(paper, name, task, config.protocol, harmful) for name, text in methods.items()})


def _defense(method: str) -> str:
    return plans.split_method(method)[0].partition(":")[0]


def check_given(plan: Plan, settings: Settings, align: Mapping[str, Any], attack: Mapping[str, Any]) -> None:
    """Raises FieldError for a given value that no cell of the plan reads."""
    read: tuple[set[str], set[str]] = (set(), set())
    for method, text in plan.pairs:
        for found, config in zip(read, plans.cell_configs(
                settings, Path("-"), Cell(plan.backbones[0], method, text, 0)), strict=True):
            found.update(flat(config) if config else ())
    for given, found, prefix in ((align, read[0], ""), (attack, read[1], "attack_")):
        for name, value in given.items():
            if name not in found:
                raise FieldError(prefix + name, f"found {value!r}, expected nothing: no method of the plan reads it")


def run(config: PlanConfig, align: Mapping[str, Any], attack: Mapping[str, Any], scores: Mapping[str, Any],
        probes: Probes = Probes(), written: Callable[[Path], None] = lambda folder: None) -> Plan:
    """Carries out what has not been carried out yet of the config's plan; results.csv in its folder has the results.

    Args:
      config: which plan, and on what recipe.
      align, attack, scores: flat values of the three stages' configs that were given.
      probes, written: as of `carry_out`.

    Raises:
      FieldError, ValueError, FileNotFoundError, FileExistsError: as of `carry_out`.
    """
    plan = config.make_plan()
    settings = make_settings(config, align, attack, scores)
    check_given(plan, settings, align, attack)
    engine.carry_out(plan, settings, Path(config.run_dir), as_lanes=config.lanes, score_backbones=config.score_base,
                     probes=probes, overwrite=config.overwrite, written=written)
    return plan
