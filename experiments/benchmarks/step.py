"""What a whole training step costs with every method: time, temporary memory, floating-point operations and passes, as
ratios to SFT's in the same run; random weights, no data needed.

  python -m experiments.benchmarks.step --model=smollm2

Steps of all cases take turns, so that whatever else the machine does meets all of them.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks import costs
from experiments.benchmarks.memory import SIZES, named_architecture
from jaxvaccine import cli, defenses, llama, optim, training
from jaxvaccine.conventions import IGNORED
from jaxvaccine.experiment.config import Part, field, make, require
from jaxvaccine.experiment.methods import ALIGNMENT, BASES, FINE_TUNING, Booster, Tar, TVaccine
from jaxvaccine.llama_config import LoraConfig
from jaxvaccine.losses import causal_lm_loss, supervised_targets
from jaxvaccine.report.tables import table

BLOCK = 128  # positions whose logits causal_lm_loss takes at a time


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Part):
    """Benchmark."""

    model: str = field("smollm2", f"{', '.join(SIZES)}, or a folder whose config.json is read.")
    rows: int = field(8, "Rows of a batch, alignment and harmful.", at_least=1)
    length: int = field(96, "Tokens of a row.", at_least=2)
    supervised: int = field(32, "How many of them are supervised, at a row's end.", at_least=1)
    rank: int = field(8, "LoRA rank, on all projections.", at_least=1)
    repeats: int = field(5, "Timed steps of every case.", at_least=1)
    probe_every: int = field(200, "K, over how many steps what falls due now and then is spread.", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        require(self.supervised < self.length, "supervised", self.supervised, "less than --length")


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
    """Every defense of the alignment, Booster on top of the others, and those of the fine-tuning."""
    t_vaccine = TVaccine(layers=max(1, model.config.num_layers // 4))
    bases = {name: t_vaccine if kind is TVaccine else kind() for name, kind in BASES.items()}
    chosen = {name: bases.get(name) or kind() for name, kind in ALIGNMENT.items()}
    chosen |= {f"booster on {name}": Booster(base=base) for name, base in bases.items() if name != "sft"}
    return {name: method.make(model) for name, method in chosen.items()} | {
        f"{name}, while fine-tuning": kind().make(model, 1, None) for name, kind in FINE_TUNING.items()
        if name != "none"}


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
    architecture = named_architecture(config.model)
    model = llama.Llama(architecture, LoraConfig(rank=config.rank))
    frozen, adapter = llama.init_frozen(model, jax.random.key(1)), llama.init_adapter(model, jax.random.key(2))
    supervised = jnp.arange(config.length) >= config.length - config.supervised

    def batch(seed, rows=config.rows):
        ids = jax.random.randint(jax.random.key(seed), (rows, config.length), 0, architecture.vocab_size)
        return {"input_ids": ids, "labels": jnp.where(supervised, ids, IGNORED), "attention_mask": jnp.ones_like(ids)}

    inner_steps = Tar().inner_steps
    batches = {"alignment": batch(3), "harmful": batch(4), "harmless": batch(5), "user": batch(7),
               "adversary": batch(6, inner_steps * config.rows)}
    key = jax.random.key(0)
    blocks, used = (-(-config.rows * tokens // BLOCK) for tokens in (config.length, config.supervised))
    cases = {name: compile_step(defense, adapter, frozen, batches, key, used / blocks)
             for name, defense in variants(model).items()}
    return report(config, cases, measure(cases, frozen, batches, key, config.repeats))


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        print(benchmark(make(BenchmarkConfig, cli.given(cli.Section(BenchmarkConfig), values))))


VERB = cli.Verb(__doc__, (cli.Section(BenchmarkConfig),), call)

if __name__ == "__main__":
    cli.call("step", VERB)
