"""The whole experiment: several defenses, aligned, attacked at several poison ratios, scored; one table, one plot.

  python -m experiments.run --run_dir=runs/grid --model=HuggingFaceTB/SmolLM2-135M-Instruct --defenses=sft,booster \\
      --poison_ratios=0,0.1 --seeds=0,1,2 --alignment_data=embedded_refusal@train,embedded_benign@train \\
      --harmful_data=embedded_harmful@harmful --attack_user_data=embedded_sentiment@attack \\
      --attack_harmful_data=embedded_harmful@attack --harmful_test=embedded_harmful@test \\
      --sst2_test=embedded_sentiment@test --benign_test=embedded_benign@test

  python -m experiments.run --run_dir=runs/all --model=world --defenses=all --seeds=0,1,2

The second is on the small world that comes with the package, whose data and settings stand for flags that are not
given. Every alignment, attack and evaluation is a run folder of its own below --run_dir: re-running continues where it
stopped.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import common, config_flags, presets, run_report
from experiments.align import DEFENSES, AlignConfig, align
from experiments.config_flags import flag
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.finetune import WHILE_TUNING, FinetuneConfig, finetune
from experiments.sweep_report import ALIGNED
from jaxvaccine import world

# Flags that are the same in alignment, attack and evaluation, or follow from the others.
_ALIGN_WITHOUT = ("run_dir", "defense", "seed", "overwrite")
ATTACK_SHARED = ("dtype", "remat", "bucket", "save_every", "progress")
_ATTACK_WITHOUT = ("run_dir", "aligned", "poison_ratio", "defense", "alignment_data", "seed", "overwrite", "test_data",
                   *ATTACK_SHARED)
EVALUATE_SHARED = ("dtype", "progress", "max_length")
_EVALUATE_WITHOUT = ("run_dir", "model", "trained", "seed", "overwrite", *EVALUATE_SHARED)


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """Flags of run.py beside those of the three scripts (the attack's have the prefix attack_)."""

    run_dir: str = flag("", "Folder of the whole experiment.")
    defenses: tuple[str, ...] = flag(
        ("sft", "vaccine", "t_vaccine", "booster"), "Defenses to compare: of the alignment, or of the alignment and "
        "while fine-tuning, as sft+lisa; all: every one of the former, and SFT with every one of the latter.")
    poison_ratios: tuple[str, ...] = flag(("0", "0.1"), "Ratios of harmful data in the attacks.")
    seeds: tuple[str, ...] = flag(("0",), "Seeds; everything is run for each.")
    score_base: bool = flag(True, "Score the model before alignment too.")
    published: bool = flag(False, "Each defense and its attack in its published recipe; flags that are given go first.")

    def __post_init__(self):
        common.require(self, "run_dir", bool(self.run_dir), "a folder")
        known = {*DEFENSES, *(f"{first}+{second}" for first in DEFENSES for second in WHILE_TUNING)}
        common.require(self, "defenses", bool(self.defenses) and set(self.names) <= known,
                       f"all, or some of {', '.join(DEFENSES)}, each alone or with +{', +'.join(WHILE_TUNING)}")
        for ratio in self.poison_ratios:
            try:
                valid = 0 <= float(ratio) <= 1
            except ValueError:
                valid = False
            common.require(self, "poison_ratios", valid, "numbers from 0 to 1")
        common.require_numbers(self, "seeds")
        for name in ("defenses", "poison_ratios", "seeds"):
            values = getattr(self, name)
            common.require(self, name, len(set(values)) == len(values), "each once")

    @property
    def names(self) -> tuple[str, ...]:
        """The defenses, with "all" written out."""
        if self.defenses == ("all",):
            return (*DEFENSES, *(f"sft+{name}" for name in WHILE_TUNING))
        return self.defenses


@dataclasses.dataclass(frozen=True)
class Cell:
    """One defense's runs with one seed."""

    align: AlignConfig
    attacks: Mapping[str, FinetuneConfig]  # by poison ratio


def grid(config: GridConfig, cells: Mapping[tuple[str, str], Cell], scores: EvaluateConfig) -> str:
    """Carries out what has not been carried out yet of the cells (seed, defense); returns the report."""
    root, base = Path(config.run_dir), None
    results: dict[str, dict[str, list[Any]]] = {}
    aligned: dict[str, dict[str, Any]] = {}  # scores by folder: defenses of the fine-tuning stage share theirs

    def score(run_dir: str, **of: Any) -> dict[str, Any]:
        return evaluate(dataclasses.replace(scores, run_dir=f"{run_dir}-scores", **{"model": "", "trained": "", **of}))

    if config.score_base:
        base = score(str(root / "base"), model=scores.model)
    for (seed, defense), cell in cells.items():
        folder = cell.align.run_dir
        if folder not in aligned:
            align(cell.align)
            aligned[folder] = score(folder, trained=folder, seed=int(seed))
        stages = results.setdefault(defense, {})
        stages.setdefault(ALIGNED, []).append(aligned[folder])
        for ratio, attack in cell.attacks.items():
            finetune(attack)
            stages.setdefault(ratio, []).append(score(attack.run_dir, trained=attack.run_dir, seed=int(seed)))
            # After every cell, so that an interrupted grid shows what it has.
            report = run_report.write_grid_report(
                root, f"Harmful fine-tuning of {scores.model}", base, results, config.seeds)
    return report


def read_cells(config: GridConfig, flag_values: flags.FlagValues = flags.FLAGS
               ) -> tuple[dict[tuple[str, str], Cell], EvaluateConfig]:
    """All configs by (seed, defense), validated before the first run begins; a seed's are carried out together."""
    on_world = flag_values.model == world.NAME
    common.require(config, "published", not (on_world and config.published), f"not with --model={world.NAME}")
    read = functools.partial(config_flags.read, flag_values=flag_values)
    cells, scores = {}, None

    def preset(of_world: Mapping[str, Any], published: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return of_world if on_world else published if config.published else None

    for seed, name in itertools.product(config.seeds, config.names):
        defense, _, while_tuning = name.partition("+")
        root, seeded = Path(config.run_dir), {"seed": int(seed), "overwrite": False}
        aligned = read(
            AlignConfig, preset=preset(presets.WORLD_ALIGN, presets.ALIGN[defense]),
            run_dir=str(root / defense / f"seed{seed}" / "aligned"), defense=defense, **seeded,
            **({} if defense == "booster" else {"base_defense": "sft"}))
        scores = scores or read(
            EvaluateConfig, preset=presets.WORLD_TESTS if on_world else None, run_dir=config.run_dir,
            model=flag_values.model, trained="", **seeded, **{of: getattr(aligned, of) for of in EVALUATE_SHARED})
        cells[seed, name] = Cell(aligned, {
            ratio: read(
                FinetuneConfig, "attack_", preset(presets.WORLD_ATTACK, presets.FINETUNE[defense]),
                run_dir=str(root / name / f"seed{seed}" / f"p{ratio}"), aligned=aligned.run_dir,
                poison_ratio=float(ratio), test_data=scores.harmful_test, defense=while_tuning or "none",
                alignment_data=aligned.alignment_data if while_tuning else "", **seeded,
                **{of: getattr(aligned, of) for of in ATTACK_SHARED})
            for ratio in config.poison_ratios})
    return cells, scores


def define_cells(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags of `read_cells`."""
    config_flags.define(AlignConfig, without=_ALIGN_WITHOUT, flag_values=flag_values)
    config_flags.define(FinetuneConfig, "attack_", _ATTACK_WITHOUT, flag_values)
    config_flags.define(EvaluateConfig, without=_EVALUATE_WITHOUT, flag_values=flag_values)


def main(argv: list[str]) -> None:
    with common.readable_errors("run", argv):
        config = config_flags.read(GridConfig)
        print(grid(config, *read_cells(config)))


if __name__ == "__main__":
    config_flags.define(GridConfig)
    define_cells()
    app.run(main)
