"""Many settings on the small world: every method, base and seed aligned, attacked and scored; a table and two plots.

  python -m experiments.sweep --run_dir=runs/sweep --seeds=0,1,2 --bases=world,bases/1,bases/2 \\
      --methods=sft,vaccine,t_vaccine,t_vaccine:freeze=released,booster:lam=0.2 \\
      --attacks=poison_ratio=0,poison_ratio=0.1,poison_ratio=0.1:adapter=new:learning_rate=2e-4

A method is a defense, an attack nothing, each followed by what differs from the flags of align.py or (with the prefix
attack_) finetune.py: `name=value`, joined by colons. All seeds of a setting are trained at once (lanes.py). A cell is a
base, a method and an attack; it has a JSON file of its own below --run_dir, and re-running continues with the cells
that are not there yet.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import app, flags

from experiments import common, config_flags, lanes, presets, sweep_report
from experiments.align import AlignConfig, batch_sources, load_data
from experiments.config_flags import flag
from experiments.finetune import FinetuneConfig
from experiments.sweep_report import ALIGNED, folder_name
from jaxvaccine import data, runs
from jaxvaccine.checkpoints import hugging_face
from jaxvaccine.checkpoints.peft import load_adapter, save_adapter
from jaxvaccine.evaluation import TaskResult, evaluate_prompts

Config = TypeVar("Config")

# What is kept of the alignment's metrics, [steps, seeds, ...].
METRICS = ("loss", "harmful_loss", "harmful_gradient_norm", "probabilities", "active_layers")
METRICS_EVERY = 5
# Prompts of every test whose answers are kept.
SHOWN = 2


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Flags of sweep.py beside those of align.py and (attack_) finetune.py."""

    run_dir: str = flag("", "Folder of the whole sweep.")
    bases: tuple[str, ...] = flag(("world",), "Models to align.")
    methods: tuple[str, ...] = flag(("sft", "vaccine", "t_vaccine", "booster"),
                                    "Defenses, each with the flags of align.py that differ: booster:lam=0.2:steps=400.")
    attacks: tuple[str, ...] = flag(("poison_ratio=0", "poison_ratio=0.1"),
                                    "Attacks, as the flags of finetune.py that differ: poison_ratio=0.1:adapter=new.")
    seeds: tuple[str, ...] = flag(("0", "1", "2"), "Seeds, of alignment and attack.")
    score_steps: tuple[str, ...] = flag(("0", "20", "40", "60", "80", "100", "150", "200", "300", "400"),
                                         "Attack steps after which a model is scored; the last one always is.")
    harmful_test: str = flag("world_harmful@test[0:100]", "Harmful prompts for HS.")
    sst2_test: str = flag("world_rating@test[0:100]", "The user's task, for FA.")
    benign_test: str = flag("world_benign@test[0:100]", "Harmless requests for over-refusal.")
    max_new_tokens: int = flag(8, "Longest answer, in tokens.")
    overwrite: bool = flag(False, "Delete an earlier sweep in --run_dir and start again.")

    def __post_init__(self):
        common.require(self, "run_dir", bool(self.run_dir), "a folder")
        for name in ("bases", "methods", "attacks"):
            common.require(self, name, bool(getattr(self, name)), "at least one")
        common.require_numbers(self, "seeds", "score_steps")
        common.check_sources(self, *TESTS.values())

    @property
    def seed_numbers(self) -> list[int]:
        return [int(seed) for seed in self.seeds]


TESTS = {"harmful_score": "harmful_test", "sst2": "sst2_test", "over_refusal": "benign_test"}


def variant(config: Config, text: str, flag_name: str, first: str | None = None) -> Config:
    """The config with the flags of "name=value:name=value"; `first` names the flag of a leading bare value.

    Values are read as on a command line, but that + separates the items of a list.

    Raises:
      ValueError: an unknown flag, a value of another type, or one that the config refuses.
    """
    items = re.split(r":(?=\w+=)", text)  # a value may have colons of its own, such as a slice of the data
    if first and "=" not in items[0]:
        items[0] = f"{first}={items[0]}"
    values = flags.FlagValues()
    config_flags.define(type(config), flag_values=values)
    try:
        if "=" not in items[0]:
            raise flags.Error("expected name=value")
        values(["", *(f"--{item.replace('+', ',')}" for item in items)])
        fields = [field.name for field in dataclasses.fields(config)]
        return config_flags.read(type(config), flag_values=values, **{
            name: getattr(config, name) for name in fields if not values[name].present})
    except (flags.Error, ValueError) as error:
        raise ValueError(f"--{flag_name}: found {text!r}: {error}") from error


class Scorer:
    """Scores lanes on the tests that the flags name."""

    def __init__(self, config: SweepConfig, tokenizer):
        self.tokenizer, self.max_new_tokens = tokenizer, config.max_new_tokens
        self.examples = {task: data.load_examples(getattr(config, name)) for task, name in TESTS.items()
                         if getattr(config, name)}

    def __call__(self, of: lanes.Lanes) -> tuple[dict[str, list[float]], dict[str, list[list[str]]]]:
        """({task: score in percent of every lane}, {task: [prompt, answer] of the first lane's first prompts})."""
        results = {task: [self._score(of, i, task) for i in range(of.count)] for task in self.examples}
        return ({task: [result.score for result in by_lane] for task, by_lane in results.items()},
                {task: [[p.prompt, p.answer] for p in by_lane[0].predictions[:SHOWN]]
                 for task, by_lane in results.items()})

    def _score(self, of: lanes.Lanes, i: int, task: str) -> TaskResult:
        adapter, frozen = of.lane(i)
        rows = self.examples[task]
        return evaluate_prompts(of.model, adapter, frozen, self.tokenizer, rows, task=task, bucket=16,
                                max_new_tokens=self.max_new_tokens, batch_size=len(rows))


def align_sources(config: AlignConfig, tokenizer) -> lanes.Sources:
    """What the alignment reads, the same in every lane."""
    return batch_sources(config, {name: data.tokenize_examples(tokenizer, rows, config.max_length)
                                  for name, rows in load_data(config).items()})


def align(config: AlignConfig, base: common.Base, tokenizer, seeds: Sequence[int], folder: Path, scorer: Scorer
          ) -> lanes.Lanes:
    """Aligned lanes: those of an earlier call, or new ones, which are scored and saved, one adapter per seed."""
    adapters = [folder / f"seed{seed}" for seed in seeds]
    start = lanes.fresh(base, config, seeds)
    if (folder / f"{ALIGNED}.json").exists():
        return start._replace(adapters=lanes.stack([load_adapter(path, start.model) for path in adapters]))
    sources = align_sources(config, tokenizer)
    started = time.monotonic()
    aligned, metrics = lanes.train(start, config, [sources] * len(seeds), seeds)
    seconds = time.monotonic() - started
    for i, path in enumerate(adapters):
        save_adapter(lanes.take(aligned.adapters, i), aligned.model, path, base_model=config.model)
    scores, answers = scorer(aligned)
    runs.write_json(folder / f"{ALIGNED}.json", {
        "scores": scores, "answers": answers, "seconds": seconds, "metrics_every": METRICS_EVERY,
        "metrics": {name: np.round(metrics[name][::METRICS_EVERY].astype(float), 4).tolist()
                    for name in METRICS if name in metrics}})
    return aligned


def attack(config: FinetuneConfig, align_config: AlignConfig, aligned: lanes.Lanes, tokenizer, seeds: Sequence[int],
           steps: Sequence[int], scorer: Scorer) -> dict[str, Any]:
    """Attacks every lane with poisoned data of its own seed, and returns the cell's result."""
    harmful, user = (common.load_sources(source) for source in (config.harmful_data, config.user_data))
    known = common.load_sources(align_config.harmful_data) if align_config.needs_harmful() else []
    forbidden = {"the alignment's harmful data": common.prompts_of(known),
                 "the test prompts": common.prompts_of(common.load_sources(config.test_data))}
    sources = [{"user": (data.tokenize_examples(
        tokenizer, data.poison(user, harmful, config.n, config.poison_ratio, seed, forbidden), config.max_length),
        config.batch_size)} for seed in seeds]
    last = common.count_steps(config, sources[0])
    start = lanes.merged(aligned, config, seeds) if config.adapter == "new" else aligned
    scores, answers = {}, {}

    def observe(step, of):
        if step in steps or step == last:
            scores[str(step)], answers[str(step)] = scorer(of)

    _, metrics = lanes.train(start, config, sources, seeds, observe)
    return {"scores": scores, "answers": answers,
            "loss": np.round(metrics["loss"][::METRICS_EVERY].astype(float), 4).tolist()}


def carry_out(config: SweepConfig, align_config: AlignConfig, attack_config: FinetuneConfig,
              pairs: Iterable[tuple[str, str]]) -> None:
    """Carries out the cells of these pairs of a method and an attack that are not there yet, on every base."""
    attack_config = dataclasses.replace(attack_config, test_data=config.harmful_test)
    variants = {(text, attack_text): (variant(align_config, text, "methods", "defense"),
                                      variant(attack_config, attack_text, "attacks")) for text, attack_text in pairs}
    root, seeds, steps = Path(config.run_dir), config.seed_numbers, [int(step) for step in config.score_steps]
    # What may grow from one call to the next is not compared; the cells have it in their paths.
    settings = {"sweep": _fixed(config, ("run_dir", "bases", "methods", "attacks", "overwrite")),
                "align": _fixed(align_config, ("run_dir", "model", *common.OPERATIONAL)),
                "attack": _fixed(attack_config, ("run_dir", "aligned", *common.OPERATIONAL))}
    runs.open_run(root, "sweep", settings, {}, {"bases": config.bases, "cells": sorted(variants)}, config.overwrite)
    for base_name in config.bases:
        directory = hugging_face.resolve_model(base_name)
        tokenizer, scorer, base, aligned = data.load_tokenizer(directory), None, None, {}
        for (text, attack_text), (method, attacked_by) in variants.items():
            folder = root / folder_name(base_name) / folder_name(text)
            cell = folder / f"{folder_name(attack_text)}.json"
            if cell.exists():
                continue
            scorer = scorer or Scorer(config, tokenizer)
            base = base or common.load_base(base_name, method.dtype)
            method = dataclasses.replace(method, model=base_name)
            if text not in aligned:  # one method's at a time
                aligned = {text: align(method, base, tokenizer, seeds, folder, scorer)}
            attacked_by = attacked_by.resolve(dataclasses.asdict(method))
            result = attack(attacked_by, method, aligned[text], tokenizer, seeds, steps, scorer)
            runs.write_json(cell, result)
            last = result["scores"][max(result["scores"], key=int)]
            print(f"{base_name} {text} {attack_text}: " + ", ".join(
                f"{task} {np.round(values, 1).tolist()}" for task, values in last.items()), flush=True)


def sweep(config: SweepConfig, align_config: AlignConfig, attack_config: FinetuneConfig) -> str:
    """Carries out the cells of every method and attack that are not there yet; returns the report."""
    carry_out(config, align_config, attack_config, itertools.product(config.methods, config.attacks))
    return sweep_report.write(Path(config.run_dir), config.bases, config.methods, config.attacks)


def _fixed(config: Any, without: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in without}


def read_configs() -> tuple[AlignConfig, FinetuneConfig]:
    """The settings that methods and attacks start from: the flags, else the small world's preset."""
    attack_config = config_flags.read(FinetuneConfig, "attack_", presets.WORLD_ATTACK, run_dir="-", aligned="-",
                                      seed=0, overwrite=False, test_data="")
    return read_align_config(), attack_config


def read_align_config() -> AlignConfig:
    """The alignment's part of `read_configs`."""
    return config_flags.read(AlignConfig, preset=presets.WORLD_ALIGN, run_dir="-", model="-", defense="sft", seed=0,
                             overwrite=False)


def define_align_config() -> None:
    """The flags of `read_align_config`."""
    config_flags.define(AlignConfig, without=("run_dir", "model", "defense", "overwrite", "seed"))


def define_configs() -> None:
    """The flags of `read_configs`."""
    define_align_config()
    config_flags.define(FinetuneConfig, "attack_", ("run_dir", "aligned", "overwrite", "seed", "test_data"))


def main(argv: list[str]) -> None:
    with common.readable_errors("sweep", argv):
        print(sweep(config_flags.read(SweepConfig), *read_configs()))


if __name__ == "__main__":
    config_flags.define(SweepConfig)
    define_configs()
    app.run(main)
