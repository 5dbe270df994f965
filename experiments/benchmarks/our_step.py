"""What is measured beside PyTorch: a training step of a method on random weights, its settings, and our side of it.

A side has `step()`, which starts a step, `wait()`, which waits for all that were started, and `last()`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import random_weights
from experiments.benchmarks.memory import SIZES, named_architecture
from jaxvaccine import llama, optim, training
from jaxvaccine.conventions import IGNORED
from jaxvaccine.experiment.config import Part, field, make, require
from jaxvaccine.experiment.methods import ALIGNMENT, AlignmentMethod, Tar, TVaccine
from jaxvaccine.llama_config import TARGETS, LlamaConfig, LoraConfig

OPTIMIZER = optim.OptimizerConfig()
# How far the two sides may be apart, relative: rounding, of sums in other orders and of what bfloat16 cannot hold.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
# Booster's gradient is a difference of two that are nearly equal, in which rounding counts.
NORM_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
SEED = 0


@dataclasses.dataclass(frozen=True)
class StepPart(Part):
    """Training step."""

    model: str = field("smollm2", f"{', '.join(SIZES)}, or a folder whose config.json is read; weights are "
                       "random.")
    methods: tuple[str, ...] = field(("sft", "vaccine", "t_vaccine", "booster"), f"Of {', '.join(ALIGNMENT)}.")
    rows: int = field(10, "Rows of a batch, alignment and harmful.", at_least=1)
    length: int = field(128, "Tokens of a row.", at_least=2)
    supervised: int = field(64, "How many of them are supervised, at a row's end.", at_least=1)
    rank: int = field(32, "LoRA rank.", at_least=1)
    targets: tuple[str, ...] = field(("q_proj", "k_proj", "v_proj"), f"Projections with LoRA, of {', '.join(TARGETS)}.")
    dtype: Literal["float32", "bfloat16"] = field("float32", "Type of weights and computation; the adapter is float32.")
    remat: Literal["none", "dots", "full"] = field("full", "What our side computes anew for the backward pass.")
    attention: Literal["xla", "cudnn"] = field("xla", "By what our side computes attention.")
    checkpointing: bool = field(False, "Whether PyTorch's side computes every layer anew (torch.utils.checkpoint).")
    pytorch_attention: Literal["sdpa", "eager"] = field("sdpa", "transformers' attention.")
    supervised_logits: bool = field(
        False, "PyTorch's side computes logits only where they are supervised, as ours always does; by default "
        "transformers' own loss, which has them everywhere.")
    probe_every: int = field(200, "K, over how many steps T-Vaccine's probe is spread.", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        require(self.supervised < self.length, "supervised", self.supervised, "less than --length")
        require(bool(self.methods) and set(self.methods) <= set(ALIGNMENT), "methods", self.methods,
                f"some of {', '.join(ALIGNMENT)}")
        require(bool(self.targets) and set(self.targets) <= set(TARGETS), "targets", self.targets,
                f"some of {', '.join(TARGETS)}")

    def architecture(self) -> LlamaConfig:
        return named_architecture(self.model)

    def lora(self) -> LoraConfig:
        return LoraConfig(rank=self.rank, targets=self.targets)

    def llama(self, **changes: Any) -> llama.Llama:
        return llama.Llama(self.architecture(), self.lora(), jnp.dtype(self.dtype).type,
                           **{"remat": self.remat, "attention": self.attention, **changes})

    def method(self, name: str, every: int) -> AlignmentMethod:
        """By its default settings; T-Vaccine's with a quarter of the layers, and draws and probes every so many
        steps."""
        if name != "t_vaccine":
            return ALIGNMENT[name]()
        layers = max(1, self.architecture().num_layers // 4)
        return make(TVaccine, {"layers": layers, "sample_every": every, "probe_every": every})

    def batches(self) -> dict[str, dict[str, np.ndarray]]:
        """What any method reads."""
        rng, vocabulary = np.random.default_rng(SEED), self.architecture().vocab_size
        supervised = np.arange(self.length) >= self.length - self.supervised

        def batch(rows: int) -> dict[str, np.ndarray]:
            ids = rng.integers(0, vocabulary, (rows, self.length), np.int32)
            return {"input_ids": ids, "labels": np.where(supervised, ids, np.int32(IGNORED)),
                    "attention_mask": np.ones_like(ids)}

        return {"alignment": batch(self.rows), "harmful": batch(self.rows), "harmless": batch(self.rows),
                "adversary": batch(self.rows * Tar().inner_steps)}


class Last(NamedTuple):
    """What a side's last step found."""

    loss: float
    gradient_norm: float  # before clipping
    active_layers: list[int] | None = None  # T-Vaccine's


class Program(NamedTuple):
    """A training step and the shapes of what it is given."""

    train_step: training.TrainStep
    state: Any  # () -> the state before the first step
    shapes: tuple[Any, ...]  # state, frozen weights, batches, key


def program(part: StepPart, method: AlignmentMethod, model: llama.Llama) -> Program:
    defense = method.make(model)
    optimizer = optim.layer_masked_adamw(OPTIMIZER, steps=1000)

    def state() -> training.TrainState:
        return training.init_train_state(jax.device_put(random_weights.adapter(model)), defense, optimizer)

    of_model = llama.tree_shapes(model)
    batches = {name: batch for name, batch in part.batches().items() if name in method.batches}
    shapes = (jax.eval_shape(lambda adapter: training.init_train_state(adapter, defense, optimizer), of_model["lora"]),
              of_model["params"], jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batches),
              jax.eval_shape(lambda: jax.random.key(SEED)))
    return Program(training.make_train_step(defense, optimizer), state, shapes)


class Ours:
    """A compiled training step and its state."""

    def __init__(self, part: StepPart, method: AlignmentMethod, model: llama.Llama, frozen: Any):
        self.frozen, self.key, self.program = frozen, jax.random.key(SEED), program(part, method, model)
        self.batches = jax.device_put({name: batch for name, batch in part.batches().items() if name in method.batches})
        self.state, self.metrics = self.program.state(), {}
        self.compiled = self.program.train_step.lower(self.state, frozen, self.batches, self.key).compile()

    def step(self) -> None:
        self.state, self.metrics = self.compiled(self.state, self.frozen, self.batches, self.key)

    def wait(self) -> None:
        jax.block_until_ready((self.state, self.metrics))

    def start_again(self) -> None:
        """With the adapter and the schedule of the first step."""
        self.state = self.program.state()

    def last(self) -> Last:
        active = self.metrics.get("active_layers")
        return Last(float(self.metrics["loss"]), float(self.metrics["gradient_norm"]),
                    None if active is None else np.flatnonzero(active).tolist())


def differences(part: StepPart, method: str, ours: Mapping[str, Any], theirs: Mapping[str, Any],
                names: tuple[str, ...] = ("loss", "gradient_norm")) -> list[str]:
    """In what two steps are further apart than rounding allows: then they were not the same computation."""
    limits = {"loss": LOSS_TOLERANCE[part.dtype], "gradient_norm": NORM_TOLERANCE[part.dtype]}
    found = []
    for name in names:
        a, b = ours[name], theirs[name]
        if not math.isfinite(a) or not abs(a - b) <= limits[name] * abs(b):
            found.append(f"{method}: {name}: found {a:.6g} (jaxvaccine) and {b:.6g} (PyTorch), expected them to differ "
                         f"by at most {limits[name]:g} of it")
    return found
