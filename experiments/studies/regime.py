"""Does a defense work, and where? HS over the steps of attacks at several budget ratios, against plain alignment.

  python -m experiments.studies.regime --run_dir=runs/regime --seeds=0,1,2 --model=world,bases/1,bases/2

The budget ratio (jaxvaccine/experiment/budget.py) of the published experiments is 200 to 800 : 1. Here models are
aligned for 15 epochs, and then attacked with a new adapter of a small LoRA scale, as T-Vaccine's paper does, and on the
aligned adapter, as Booster's; at learning rates that go through the published range and beyond it. T-Vaccine is aligned
for as many steps as the others, and for as many per layer that trains; Booster with all harmful examples and with few.
The verdicts at the end are of differences from SFT with the same backbone, seed and attack.

On a model of your own, give --recipe=none, the data, and the stages' settings."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.studies import published, study
from jaxvaccine import cli
from jaxvaccine.experiment.config import field
from jaxvaccine.experiment.plan_folder import Probes
from jaxvaccine.report.regime import regime_report

# Beside the small world's recipe. 1500 steps are 15 epochs of its alignment data, 500 are 20 of the user's.
STEPS = 1500
ALIGN: dict[str, Any] = {"steps": STEPS, "learning_rate": 1e-3, "schedule": "cosine", "warmup_ratio": 0.1}
ATTACK: dict[str, Any] = {"steps": 500}
NEW = "poison_ratio=0.1:adapter=new:rank=8:lora_alpha=1:learning_rate="
CONTINUED = "poison_ratio=0.1:adapter=continue:learning_rate="


@dataclasses.dataclass(frozen=True)
class RegimeConfig(study.StudyConfig):
    """Plan."""

    defenses: tuple[str, ...] = field(
        ("sft", "vaccine", "t_vaccine", "t_vaccine:freeze=released", f"t_vaccine:steps={2 * STEPS}", "booster",
         "booster:harmful_data=world_harmful@harmful[0:20]"),
        "Methods, as of run; sft is what the others are compared with.")
    attacks: tuple[str, ...] = field(
        (f"{NEW}1e-4", f"{NEW}3e-4", f"{CONTINUED}1e-5", f"{CONTINUED}3e-5"),
        "Attacks, as of run; each says whether it goes on with the aligned adapter.")
    score_steps: tuple[str, ...] = field(
        ("25", "50", "100", "150", "200", "300", "400", "500"),
        "Attack steps after which a model is scored; the last one always is.")


def report(config: RegimeConfig, found: pd.DataFrame, folder: Path) -> str:
    return regime_report(found, folder, config.make_plan(), published.harm_curves())


def defaults(config: RegimeConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat values of alignment and attack that stand for flags that are not given."""
    return (ALIGN, ATTACK) if config.on_world else ({}, {})


VERB = study.verb(__doc__, RegimeConfig, lambda config: Probes(), report, {"loss_data": ""}, defaults=defaults)

if __name__ == "__main__":
    cli.call("regime", VERB)
