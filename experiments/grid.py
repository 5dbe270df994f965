"""The papers' experiment grid on the small world, a part a command: tables, plots and a report.

  python -m experiments.grid --grid=ratios --run_dir=runs/grid --bases=world,runs/bases/1,runs/bases/2

Grids: ratios (of harmful data), samples (of the user), sensitivity (to every setting), ablations, worst_case (the
attacker who chooses among attacks); panels.py says what each varies. The cells are a sweep's (sweep.py) below
--run_dir, common to all grids: re-running continues with those that are not there yet. Beside these,
criticality.py, model_statistics.py and benchmark_step.py measure layers, losses and costs.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from absl import app

from experiments import common, config_flags, grid_report, reports, sweep
from experiments.align import AlignConfig
from experiments.config_flags import flag
from experiments.finetune import FinetuneConfig
from experiments.panels import GRIDS, METHODS, cells


@dataclasses.dataclass(frozen=True)
class GridConfig(sweep.SweepConfig):
    """Flags of grid.py beside those of align.py and (attack_) finetune.py."""

    grid: Literal["ratios", "samples", "sensitivity", "ablations", "worst_case"] = flag("ratios", "Which part.")
    methods: tuple[str, ...] = flag(METHODS, "Methods that are compared where a grid compares methods.")


def grid(config: GridConfig, align_config: AlignConfig, attack_config: FinetuneConfig) -> str:
    """Carries out the grid's cells that are not there yet; returns the report."""
    panels = GRIDS[config.grid].panels(config.methods)
    of_sweep = sweep.SweepConfig(**{field.name: getattr(config, field.name)
                                    for field in dataclasses.fields(sweep.SweepConfig)})
    sweep.carry_out(of_sweep, align_config, attack_config, cells(panels))
    root = Path(config.run_dir)
    folder = root / config.grid
    folder.mkdir(exist_ok=True)
    parts = []
    if config.grid == "worst_case":
        parts.append(grid_report.worst_case_report(root, folder, config.bases, panels.pop()))
    parts += [grid_report.panel_report(root, folder, config.bases, panel, i) for i, panel in enumerate(panels)]
    text = "\n".join([f"# {GRIDS[config.grid].title}\n", *parts, grid_report.note(config.bases, config.seeds)])
    (folder / reports.REPORT).write_text(text, encoding="utf-8")
    return text


def main(argv: list[str]) -> None:
    with common.readable_errors("grid", argv):
        print(grid(config_flags.read(GridConfig, attacks=("-",)), *sweep.read_configs()))


if __name__ == "__main__":
    config_flags.define(GridConfig, without=("attacks",))
    sweep.define_configs()
    app.run(main)
