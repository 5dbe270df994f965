"""A whole experiment from one config: which plan, what its cells start from, and carrying it out."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxvaccine import world
from jaxvaccine.experiment import carry_out as engine
from jaxvaccine.experiment import plans, recipes
from jaxvaccine.experiment.attack import split_new_adapter
from jaxvaccine.experiment.config import FieldError, Part, field, flat, make, require
from jaxvaccine.experiment.evaluate import EvaluateConfig
from jaxvaccine.experiment.methods import ALIGNMENT, FINE_TUNING
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
        "latter.")
    poison_ratios: tuple[str, ...] = field(("0", "0.1"), "Attacks: ratios of harmful data.")
    attacks: tuple[str, ...] = field(
        (), "Attacks, as what differs from the flags attack_…: poison_ratio=0.1:adapter=new. Instead of "
        "--poison_ratios.")
    seeds: tuple[str, ...] = field(("0",), "Seeds, of alignment and attack; everything is run for each.")
    plan: Literal["", "ratios", "samples", "sensitivity", "ablations", "worst_case"] = field(
        "", "A grid of the papers on the small world, instead of --defenses times attacks.")
    recipe: Literal["auto", "world", "published", "none"] = field(
        "auto", "What stands for flags that are not given: the small world's settings and data, each defense's "
        "published recipe, or neither; auto is world for --model=world and none for others.")
    lanes: bool = field(
        False, "Train all seeds of a setting at once, and score along the attack: for small models.")
    score_steps: tuple[str, ...] = field(
        ("20", "40", "60", "80", "100", "150", "200", "300", "400"), "--lanes: attack steps after which a model is "
        "scored; the last one always is.")
    score_base: bool = field(True, "Score the backbones as they come too.")
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
        """The defenses, with "all" written out."""
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
      FieldError: a value that the evaluation refuses, or a method without a published recipe where that is asked for.
    """
    published = config.recipe == "published"
    names = [name for name in ALIGNMENT if name in recipes.ALIGN or not published]
    for method in config.methods:
        defense = plans.split_method(method)[0].partition(":")[0]
        require(defense in names, "recipe", config.recipe, f"another: {defense} has no published recipe")
    of_align = {name: recipes.WORLD_ALIGN if config.on_world else recipes.ALIGN[name] if published else {}
                for name in names}
    of_attack = {name: recipes.WORLD_ATTACK if config.on_world else recipes.FINETUNE[name] if published else {}
                 for name in names}
    of_align = {name: {**recipe, **align} for name, recipe in of_align.items()}
    shared = {name: value for name, value in of_align["sft"].items()
              if name in ("dtype", "max_length", "prompt", "data_protocol", "revision")}
    evaluated = make(EvaluateConfig, scores, {
        **(recipes.WORLD_TESTS if config.on_world else {}), **shared, "model": config.model[0],
        "run_dir": config.run_dir, "progress": config.progress})
    parts = {name: split_new_adapter(recipe) for name, recipe in of_attack.items()}
    return Settings(of_align, {name: {**shared, **attack} for name, (shared, _) in parts.items()}, evaluated,
                    {name: new for name, (_, new) in parts.items()})


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
        probes: engine.Probes = engine.Probes(), written: Callable[[Path], None] = lambda folder: None) -> Plan:
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
