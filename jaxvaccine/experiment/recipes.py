"""Recipes, as flat values of a config: the published ones of Booster (arXiv 2409.01586) and T-Vaccine (arXiv
2410.09760), and the small world's."""

from typing import Any

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QKV = ("q_proj", "k_proj", "v_proj")

_BOOSTER = {
    "rank": 32, "lora_alpha": 4.0, "dropout": 0.0, "targets": QKV, "learning_rate": 5e-4, "schedule": "constant",
    "warmup_ratio": 0.0, "weight_decay": 0.1, "batch_size": 10, "harmful_batch_size": 10, "epochs": 20.0,
    "max_length": 256,
}
_VACCINE = {
    "rank": 8, "lora_alpha": 4.0, "dropout": 0.1, "targets": ALL, "learning_rate": 1e-3, "schedule": "cosine",
    "warmup_ratio": 0.1, "weight_decay": 0.1, "batch_size": 10, "epochs": 20.0, "max_length": 200,
}

ALIGN: dict[str, dict[str, Any]] = {
    "booster": {**_BOOSTER, "defense": "booster", "lam": 5.0, "alpha": 0.1},
    "sft": {**_BOOSTER, "defense": "sft"},
    "vaccine": {**_VACCINE, "defense": "vaccine", "rho": 2.0},
    "t_vaccine": {**_VACCINE, "defense": "t_vaccine", "rho": 3.0, "layers": 8, "sample_every": 20, "probe_every": 200,
                  "harmful_batch_size": 1},
    # As Booster's authors compare with it; the weights of its own paper are 1 and 0.001, for all weights of a model.
    "repnoise": {**_BOOSTER, "defense": "repnoise", "batch_size": 5, "harmful_batch_size": 5, "ascent_weight": 0.1,
                 "noise_weight": 0.001},
    # The recipe and the adversary are those of T-Vaccine's comparison, whose program loses the gradient of the
    # tamper-resistance loss; the weights are those of TAR's own, which trains all weights of a model.
    "tar": {**_VACCINE, "defense": "tar", "harmful_batch_size": 10, "adversary": "sgd", "inner_steps": 1,
            "inner_learning_rate": 0.01, "tamper_weight": 4.0, "retain_weight": 1.0},
}

# Whether the aligned adapter goes on or a new one starts is --adapter=auto's to say: Booster's and TAR's go on. (TAR is
# compared with a new one in T-Vaccine's paper.) rank, lora_alpha and targets are a new adapter's.
_ATTACK = {"learning_rate": 1e-5, "weight_decay": 0.1, "batch_size": 10, "epochs": 20.0, "n": 1000, "poison_ratio": 0.1}
_T_VACCINE_ATTACK = {**_ATTACK, "max_length": 200, "rank": 8, "lora_alpha": 1.0, "dropout": 0.1}

FINETUNE: dict[str, dict[str, Any]] = {
    "booster": {**_ATTACK, "max_length": 256}, "sft": {**_ATTACK, "max_length": 256}, "vaccine": _T_VACCINE_ATTACK,
    "t_vaccine": _T_VACCINE_ATTACK, "repnoise": {**_ATTACK, "max_length": 256}, "tar": _T_VACCINE_ATTACK,
}

# The small world (jaxvaccine/data/world.py), not published: an attack within whose 100 steps plain alignment goes from
# intact to undone, and defenses in settings that a search did not improve on (docs/results/sensitivity.md).
WORLD_ALIGN: dict[str, Any] = {
    "rank": 8, "lora_alpha": 16.0, "dropout": 0.0, "targets": ALL, "learning_rate": 3e-3, "weight_decay": 0.1,
    "steps": 150, "batch_size": 16, "harmful_batch_size": 16, "max_length": 16, "bucket": 16, "remat": "none",
    "alignment_data": "world_refusal@train[0:800],world_benign@train[0:800]",
    "harmful_data": "world_harmful@harmful[0:600]", "harmless_data": "world_refusal@harmful", "rho": 5.0, "layers": 3,
    "sample_every": 20, "probe_every": 20, "lam": 0.2, "alpha": 0.1,
}
WORLD_ATTACK: dict[str, Any] = {
    "n": 500, "batch_size": 20, "steps": 100, "learning_rate": 2e-4, "weight_decay": 0.1, "max_length": 16,
    "bucket": 16, "remat": "none", "adapter": "continue", "user_data": "world_rating@attack",
    "harmful_data": "world_harmful@attack", "lisa_alignment_steps": 2,
    "lisa_user_steps": 18,
}
WORLD_TESTS: dict[str, Any] = {
    "harmful_test": "world_harmful@test[0:100]", "sst2_test": "world_rating@test[0:100]",
    "benign_test": "world_benign@test[0:100]", "loss_data": "world_harmful@test[0:100]", "max_new_tokens": 8,
    "label_max_new_tokens": 8, "eval_batch_size": 100, "eval_bucket": 16,
}
