"""What a whole training step costs with every method: time, temporary memory, floating-point operations and passes, as
ratios to SFT's in the same run; random weights, no data needed.

  python -m experiments.benchmark_step --model=smollm2

Steps of all cases take turns, so that whatever else the machine does meets all of them.
"""

import dataclasses
import time
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from experiments import align, common, config_flags, costs, finetune
from experiments.config_flags import flag
from experiments.reports import table
from jaxvaccine import defenses, llama, optim, training
from jaxvaccine.conventions import IGNORED
from jaxvaccine.llama_config import LlamaConfig, LoraConfig
from jaxvaccine.losses import causal_lm_loss, supervised_targets

SMOLLM2 = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
                      num_kv_heads=3, head_dim=64, rope_theta=1e5, tie_word_embeddings=True)
BLOCK = 128  # positions whose logits causal_lm_loss takes at a time


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Flags of benchmark_step.py."""

    model: str = flag("smollm2", "smollm2, the shape of SmolLM2-135M, or a model whose config.json is read.")
    rows: int = flag(8, "Rows of a batch, alignment and harmful.")
    length: int = flag(96, "Tokens of a row.")
    supervised: int = flag(32, "How many of them are supervised, at a row's end.")
    rank: int = flag(8, "LoRA rank, on all projections.")
    repeats: int = flag(5, "Timed steps of every case.")
    probe_every: int = flag(200, "K, over how many steps what falls due now and then is spread.")

    def __post_init__(self):
        for name in ("rows", "rank", "repeats", "probe_every"):
            common.require(self, name, getattr(self, name) >= 1, "at least 1")
        common.require(self, "supervised", 1 <= self.supervised < self.length, "at least 1, less than --length")


def full_logits_loss(model: llama.Llama):
    """The same loss from the logits of every position, [B, T, V]: what most implementations compute."""
    def loss_fn(adapter, frozen, batch, perturbations=None, key=None):
        hidden = llama.hidden_states(model, adapter, frozen, batch["input_ids"], batch["attention_mask"],
                                     perturbations=perturbations, key=key)
        targets, supervised = supervised_targets(batch["labels"])
        log_p = jax.nn.log_softmax(llama.token_logits(model, frozen, hidden))
        picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -jnp.where(supervised, picked, 0).sum() / supervised.sum(), {}

    return loss_fn


def methods(model: llama.Llama) -> dict[str, defenses.Defense]:
    """Every defense that align.py has, Booster on top of the others, and those that finetune.py has."""
    bases = typing.get_args(typing.get_type_hints(align.AlignConfig)["base_defense"])
    chosen = {name: {"defense": name} for name in align.DEFENSES}
    chosen |= {f"booster on {base}": {"defense": "booster", "base_defense": base} for base in bases if base != "sft"}
    anything = {"model": "-", "run_dir": "-", "alignment_data": "embedded_refusal@train",
                "harmful_data": "embedded_harmful@harmful", "layers": max(1, model.config.num_layers // 4)}
    aligning = {name: align.make_defense(align.AlignConfig(**anything, **changes))(model)
                for name, changes in chosen.items()}
    tuning = finetune.FinetuneConfig(run_dir="-", aligned="-", user_data="embedded_sentiment@attack", poison_ratio=0.0,
                                     alignment_data="embedded_refusal@train")
    return aligning | {
        f"{name}, while fine-tuning": finetune.make_defense(dataclasses.replace(tuning, defense=name), 1)(model, None)
        for name in finetune.WHILE_TUNING}


def variants(model: llama.Llama) -> dict[str, defenses.Defense]:
    """All that is measured: the methods, and SFT with another loss and other rematerialisation."""
    return {
        **methods(model), "sft, logits of every position": defenses.sft(full_logits_loss(model)),
        **{f"sft, remat={remat}": defenses.sft(causal_lm_loss(model.clone(remat=remat)))
           for remat in ("dots", "none")}}


class Case(NamedTuple):
    """A compiled training step."""

    step: Any
    state: training.TrainState
    memory: int  # bytes, temporary
    always: costs.Cost
    due: costs.Cost


def compile_step(defense: defenses.Defense, adapter, frozen, batches, key, share_of_blocks: float) -> Case:
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(), steps=1000)
    state = training.init_train_state(adapter, defense, optimizer)
    step = training.make_train_step(defense, optimizer)
    compiled = step.lower(state, frozen, batches, key).compile()
    layers = jax.tree.leaves(adapter)[0].shape[0]
    always, due = costs.count(step, state, frozen, batches, key, layers=layers, share_of_blocks=share_of_blocks)
    return Case(compiled, state, compiled.memory_analysis().temp_size_in_bytes, always, due)


def measure(cases: Mapping[str, Case], frozen, batches, key, repeats: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{case: seconds of (usual steps, steps in which something falls due)}, [repeats] each, or none of the latter."""
    def timed(step, state):
        jax.block_until_ready(state)
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, frozen, batches, key))
        return state, time.perf_counter() - started

    seconds = {name: ([], []) for name in cases}
    for _ in range(1 + repeats):
        for name, case in cases.items():
            usual, due = seconds[name]
            state = jax.tree.map(jnp.copy, case.state)
            if case.due.flops:  # in the first step everything falls due
                state, taken = timed(case.step, state)
                due.append(taken)
            usual.append(timed(case.step, state)[1])
    # The first round is not counted.
    return {name: (np.array(usual[1:]), np.array(due[1:])) for name, (usual, due) in seconds.items()}


def report(config: BenchmarkConfig, cases: Mapping[str, Case], seconds: Mapping[str, tuple[np.ndarray, np.ndarray]]
           ) -> str:
    """Markdown: a table of ratios to SFT's, and what falls due now and then."""
    sft, (sft_seconds, _) = cases["sft"], seconds["sft"]

    def ratio(values):
        return f"{np.median(values):.2f} ({values.min():.2f}–{values.max():.2f})"

    rows, notes = [], []
    for name, case in cases.items():
        usual, due = seconds[name]
        rows.append([name, ratio(usual / sft_seconds), f"{case.memory / sft.memory:.2f}",
                     f"{case.always.flops / sft.always.flops:.2f}", f"{case.always.forward} + {case.always.backward}"])
        if case.due.flops:
            extra = np.median((due - usual) / sft_seconds)
            notes.append(
                f"{name}: a step in which its probe falls due costs {extra:.2f} of SFT's time more, "
                f"{case.due.flops / sft.always.flops:.2f} of its FLOPs, {case.due.forward} + {case.due.backward} "
                f"passes; over K = {config.probe_every} steps that is {100 * extra / config.probe_every:.2f}% of SFT's "
                "time.\n")
    return "\n".join([
        f"{config.model}, {config.rows} rows of {config.length} tokens, {config.supervised} supervised, LoRA rank "
        f"{config.rank}, {jax.devices()[0].platform}; SFT: {np.median(sft_seconds):.3g} s, {sft.memory / 1e6:.0f} MB "
        f"of temporary memory, {sft.always.flops / 1e9:.3g} GFLOP\n",
        table(["", "time / SFT's", "temporary memory / SFT's", "FLOPs / SFT's", "passes, forward + backward"], rows),
        f"Time: median of {config.repeats} ratios (least–most), each to SFT's step of the same round. FLOPs: matrix "
        "products, those of rematerialisation too.\n", *notes])


def benchmark(config: BenchmarkConfig) -> str:
    """Carries out the benchmark; returns its report."""
    architecture = SMOLLM2 if config.model == "smollm2" else common.read_architecture(config.model)
    model = llama.Llama(architecture, LoraConfig(rank=config.rank))
    frozen, adapter = llama.init_frozen(model, jax.random.key(1)), llama.init_adapter(model, jax.random.key(2))
    supervised = jnp.arange(config.length) >= config.length - config.supervised

    def batch(seed, rows=config.rows):
        ids = jax.random.randint(jax.random.key(seed), (rows, config.length), 0, architecture.vocab_size)
        return {"input_ids": ids, "labels": jnp.where(supervised, ids, IGNORED), "attention_mask": jnp.ones_like(ids)}

    inner_steps = align.AlignConfig.inner_steps
    batches = {"alignment": batch(3), "harmful": batch(4), "harmless": batch(5), "user": batch(7),
               "adversary": batch(6, inner_steps * config.rows)}
    key = jax.random.key(0)
    blocks, used = (-(-config.rows * tokens // BLOCK) for tokens in (config.length, config.supervised))
    cases = {name: compile_step(defense, adapter, frozen, batches, key, used / blocks)
             for name, defense in variants(model).items()}
    return report(config, cases, measure(cases, frozen, batches, key, config.repeats))


def main(argv: list[str]) -> None:
    with common.readable_errors("benchmark_step", argv):
        print(benchmark(config_flags.read(BenchmarkConfig)))


if __name__ == "__main__":
    config_flags.define(BenchmarkConfig)
    app.run(main)
