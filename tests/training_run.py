"""A small training run, for tests that interrupt it: in their process, or as a program that they kill.

  python -m tests.training_run FOLDER DEFENSE PAUSE
"""

import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxvaccine import defenses, llama, losses, optim, training
from jaxvaccine.checkpoints.orbax_state import open_checkpoints
from jaxvaccine.llama_config import LlamaConfig
from tests import tiny

STEPS, SAVE_EVERY = 10, 2
CONFIG = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2,
                          num_kv_heads=1, head_dim=8)


def batches(step):
    return {"alignment": tiny.batch(step, 2, 8, 31), "harmful": tiny.batch(1000 + step, 1, 8, 31)}


@functools.cache
def prepare(name):
    """(make_state, train_step, frozen, adapter); T-Vaccine is with dropout, its layers drawn at every step."""
    model = tiny.model(rank=2, dropout=0.1 if "t_vaccine" in name else 0.0, config=CONFIG, remat="none",
                       targets=("v_proj", "up_proj"))
    adapter, frozen = tiny.trees(model)
    loss_fn = losses.causal_lm_loss(model)
    defense = {
        "sft": lambda: defenses.sft(loss_fn),
        "t_vaccine": lambda: defenses.t_vaccine(loss_fn, 1.0, layers=1, sample_every=1, probe_every=3),
        "t_vaccine_released": lambda: defenses.t_vaccine(
            loss_fn, 1.0, layers=1, sample_every=1, probe_every=3, freeze="released", in_mlp=llama.in_mlp),
        "booster": lambda: defenses.booster(loss_fn),
    }[name]()
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(1e-2, "cosine", 0.1), STEPS)
    train_step = training.make_train_step(defense, optimizer)
    return lambda: training.init_train_state(adapter, defense, optimizer), train_step, frozen, adapter


def run(folder, name, steps=STEPS, batches=batches, key=0):
    """Trains to `steps`, from the newest checkpoint in the folder if there is one."""
    make_state, train_step, frozen, _ = prepare(name)
    state = make_state()
    with open_checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(state)
        return training.fit(
            train_step, state, frozen, batches, steps=steps, key=jax.random.key(key), progress=False,
            metrics_path=folder / "metrics.jsonl", save=checkpoints.save, save_every=SAVE_EVERY)


def main(folder, name, pause):
    def slowly(step):
        time.sleep(float(pause))
        return batches(step)

    jax.config.update("jax_disable_most_optimizations", True)
    state = run(Path(folder), name, batches=slowly)
    np.savez(Path(folder) / "state.npz", *jax.tree.leaves(state))


if __name__ == "__main__":
    main(*sys.argv[1:])
