"""What a run takes of a GPU's memory, whether a card has it, the largest batch, and which flag would help."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvaccine import memory, memory_model, optim, training
from jaxvaccine.attacks import all_weights
from jaxvaccine.data.batching import bucket_length
from jaxvaccine.evaluation.generate import BLOCK, SMALLEST, joining
from jaxvaccine.experiment import methods, objectives
from jaxvaccine.experiment.methods import AlignmentMethod, TuningMethod
from jaxvaccine.experiment.objectives import Objective, Plain
from jaxvaccine.experiment.parts import AUTO
from jaxvaccine.llama import Llama, tree_shapes
from jaxvaccine.memory import GIB
from jaxvaccine.memory_model import Memory, Pass
from jaxvaccine.quantisation import Kind

CONTEXT = GIB // 2  # what CUDA itself takes of a card, which no program gets
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of the card, that JAX takes when it starts; 0.75 unless given
MOST = 2**14  # rows: where a search for more ends
MARGIN = 0.1  # of what is free, which decoding leaves to what no formula knows, such as fragmentation
REPNOISE_SITES = 3.6  # of all layers: XLA's schedules take 3.2 to 4.2, by card and model


class Target(NamedTuple):
    """A card."""

    name: str
    total: int  # bytes it has
    reserved: int  # of these, what JAX takes when it starts

    @property
    def largest(self) -> int:
        """Bytes that a program can have, if JAX is given all that CUDA leaves."""
        return self.total - CONTEXT


def card(name: str) -> Target:
    """One of `memory.CARDS`, under JAX's own rule.

    Raises:
      ValueError: as of `memory.card_memory`.
    """
    total = memory.card_memory(name)
    return Target(name, total, int(0.75 * total))


def this_machine() -> Target | None:
    """The GPU of this machine; None without one, or where its allocator tells nothing."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    if not stats or "bytes_limit" not in stats:
        return None
    fraction = float(os.environ.get(FRACTION) or 0.75)
    return Target(device.device_kind, int(stats["bytes_limit"] / fraction), stats["bytes_limit"])


def passes(method: AlignmentMethod | TuningMethod | Objective, layers: int, rows: int, harmful_rows: int
           ) -> list[Pass]:
    """The passes of a method's step, and what it holds during each, as its file in jaxvaccine/defenses says.

    Args:
      method: of either stage, or an attacker's objective.
      layers: L of the model.
      rows: of the alignment's or the user's batch.
      harmful_rows: of the other batches.
    """
    match method:
        # The gradient at every site while it is taken, then the perturbations.
        case methods.Vaccine() | objectives.CounterPerturbation():
            return [Pass(rows, sites=layers, perturbed=rows)]
        case methods.TVaccine():  # the same of S layers; the probe keeps no gradient
            return [Pass(rows, sites=method.layers, perturbed=rows), Pass(harmful_rows)]
        case methods.RepNoise():  # of the harmful rows the inputs and MLP outputs of all layers, and their gradients
            sites = REPNOISE_SITES * layers
            return [Pass(rows, sites=sites * harmful_rows / rows, waiting=harmful_rows),
                    Pass(harmful_rows, sites=sites, divides=False)]
        case methods.Tar():  # the hidden states' gradients; the attack's adapter, optimizer and gradients
            return [Pass(rows, sites=layers, trees=2), Pass(harmful_rows, trees=5)]
        case methods.Booster():  # three gradients
            harmful = Pass(harmful_rows, sites=3 * layers if method.exact else 0, trees=4, everything=method.exact)
            return [*passes(method.base, layers, rows, harmful_rows), harmful]
        case objectives.Steepen() | objectives.Meta():  # the same
            exact = method.exact
            return [Pass(rows), Pass(harmful_rows, sites=3 * layers if exact else 0, trees=4, everything=exact)]
        case _:
            return [Pass(rows)]


@dataclasses.dataclass(frozen=True)
class Step:
    """All that a training step's memory depends on.

    Attributes:
      model: with the adapter's sites; its dtype, and how it is computed, count.
      method: of either stage.
      rows: of the alignment's or the user's batch.
      harmful_rows: of the other batches.
      length: the longest to which a batch is padded.
      quantisation: of the backbone.
      optimizer: what it keeps beside the adapter, such as AdamW's two moments.
      objective: of an attack.
    """

    model: Llama
    method: AlignmentMethod | TuningMethod
    rows: int
    harmful_rows: int
    length: int
    quantisation: Kind = "none"
    optimizer: optim.Kind = "adamw"
    objective: Objective = Plain()

    def defense(self, model: Llama | None = None) -> training.Defense:
        model = model or self.model
        if isinstance(self.method, TuningMethod):
            return self.objective.make(model, self.method.make(model, 1, None), None)
        return self.method.make(model)

    def transformation(self) -> optax.GradientTransformation:
        return optim.layer_masked_optimizer(optim.OptimizerConfig(kind=self.optimizer), 1000)

    def state(self) -> training.TrainState:
        """ShapeDtypeStructs of the train state."""
        defense, optimizer = self.defense(), self.transformation()
        return jax.eval_shape(lambda adapter: training.init_train_state(adapter, defense, optimizer),
                              tree_shapes(self.model)["lora"])

    def estimate(self) -> Memory:
        """By the formula."""
        of = self.objective if self.objective.alone else self.method
        found = passes(of, self.model.config.num_layers, self.rows, self.harmful_rows)
        if self.model.microbatch_size:
            found = [_in_microbatches(one, self.model.microbatch_size) for one in found]
        state = _state_bytes(dataclasses.replace(self, rows=1, harmful_rows=1, length=1))
        return memory_model.step(self.model, found, self.length, state, self.quantisation)

    def compiled(self, device: jax.Device | None = None) -> memory.Memory:
        """By XLA, compiled for a device as of `memory.card_device`; None is this machine's."""
        def batch(rows):
            return dict.fromkeys(("input_ids", "labels", "attention_mask"),
                                 jax.ShapeDtypeStruct((rows, self.length), jnp.int32))

        tar = methods.uses(self.method, methods.Tar)
        batches = self.method.batches + self.objective.batches
        sizes = {"alignment": self.rows, "user": self.rows, "harmful": self.harmful_rows,
                 "harmless": self.harmful_rows, "adversary": self.harmful_rows * (tar.inner_steps if tar else 1)}
        step = training.make_train_step(self.defense(), self.transformation())
        frozen = memory_model.tree_shapes(self.model, self.quantisation)["params"]
        return memory.program_memory(step, self.state(), frozen, {name: batch(sizes[name]) for name in batches},
                                     jax.eval_shape(lambda: jax.random.key(0)), device=device)

    def changes(self, bucket: int) -> Iterator[tuple[str, Callable[[int], "Step"], list[int]]]:
        """Flags that take memory off, those that change least first: (the flag with {} for its value, the step with a
        value, the values, falling)."""
        def replaced(**fields):
            return dataclasses.replace(self, **fields)

        def of_model(**fields):
            return replaced(model=self.model.clone(**fields))

        if self.model.remat != "full":
            yield "--remat=full", lambda _: of_model(remat="full"), [0]
        if jnp.dtype(self.model.dtype).itemsize > 2:
            yield "--dtype=bfloat16", lambda _: of_model(dtype=jnp.bfloat16), [0]
        t_vaccine = methods.uses(self.method, methods.TVaccine)
        largest = max(self.rows, self.harmful_rows)
        at_a_time = min(self.model.microbatch_size or largest, largest)
        yield ("--microbatch_size={0}", lambda rows: of_model(microbatch_size=rows),
               list(range(at_a_time - 1, 0, -1)))
        if isinstance(self.method, AlignmentMethod):  # an attack has the alignment's
            kinds = ("none", "int8", "nf4")
            for kind in kinds[kinds.index(self.quantisation) + 1:]:
                yield f"--quantisation={kind}", lambda _, kind=kind: replaced(quantisation=kind), [0]
        harmful = " --harmful_batch_size={0}" if len(self.method.batches) > 1 and not isinstance(
            self.method, TuningMethod) else " --objective_batch_size={0}" if self.objective.batches else ""
        yield ("--batch_size={0}" + harmful,
               lambda rows: replaced(rows=min(rows, self.rows), harmful_rows=min(rows, self.harmful_rows)),
               list(range(largest - 1, 0, -1)))
        yield "--max_length={0}", lambda n: replaced(length=n), list(range(_below(self.length, bucket), 0, -bucket))
        if t_vaccine and t_vaccine is self.method:
            yield ("--layers={0}", lambda count: replaced(method=dataclasses.replace(t_vaccine, layers=count)),
                   list(range(t_vaccine.layers - 1, 0, -1)))
        rank = self.model.lora.rank
        yield ("--rank={0}", lambda rank: of_model(lora=dataclasses.replace(self.model.lora, rank=rank)),
               [rank >> i for i in range(1, rank.bit_length())])


def all_weights_bytes(model: Llama, method: TuningMethod) -> tuple[int, int]:
    """Of an attack on all weights: bytes of the weights as they train, and of the train state, weights among it."""
    weights = all_weights.shapes(model)
    defense = method.make(model, 1, None, methods.OF_ALL_WEIGHTS)
    optimizer = optim.layer_masked_adamw(optim.OptimizerConfig(), 1)
    state = jax.eval_shape(lambda weights: training.init_train_state(weights, defense, optimizer), weights)
    return memory.tree_bytes(weights), memory.tree_bytes(state)


def with_remat(asked: str, step: Step, target: Target | None = None) -> Step:
    """The step with as little computed anew as there is memory for, if that was left open.

    On a CPU products are kept and nothing else: keeping all of it takes longer, by what is written.

    Args:
      asked: of `ComputationPart`.
      step: with all of it computed anew.
      target: the GPU; None is this machine's, or its CPU.
    """
    if asked != AUTO:
        return step
    if target := target or this_machine():
        choices, room = ("none", "dots"), int((1 - MARGIN) * target.reserved)
    elif jax.default_backend() == "cpu":
        choices, room = ("dots",), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    else:
        return step
    less = [dataclasses.replace(step, model=step.model.clone(remat=remat)) for remat in choices]
    return next((one for one in less if one.estimate().peak <= room), step)


def _in_microbatches(one: Pass, size: int) -> Pass:
    """The pass of a few rows at a time; gradients are summed."""
    if size >= one.rows or not one.divides:
        return one
    sites = one.sites * one.rows / size if one.waiting else one.sites  # they are of the pass that waits
    return one._replace(rows=size, sites=sites, trees=one.trees + 1)


@functools.lru_cache(maxsize=64)
def _state_bytes(of: Step) -> int:
    # No batch changes it.
    return memory.tree_bytes(of.state())


def _below(length: int, bucket: int) -> int:
    """The largest multiple of the bucket below a length."""
    return (length - 1) // bucket * bucket


def _largest(values: list[int], fits: Callable[[int], bool]) -> int | None:
    """The first of falling values that fits, where all behind it do; None if none does."""
    if not values or not fits(values[-1]):
        return None
    low, high = -1, len(values) - 1  # what is at low does not fit, what is at high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(values[middle]) else (middle, high)
    return values[high]


def largest_batch(step: Step, room: int) -> int:
    """The most rows, of all batches alike, that take at most `room` bytes; 0 if not even one does."""
    return _most(lambda rows: dataclasses.replace(step, rows=rows, harmful_rows=rows).estimate().peak <= room)


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number of rows that fits, at most MOST; 0 if none does."""
    top = 1
    while top < MOST and fits(top):
        top *= 2
    return _largest(list(range(top, 0, -1)), fits) or 0


def helpful_flag(step: Step, room: int, bucket: int) -> tuple[str, int, bool] | None:
    """(the flag, the peak with it, whether that is at most `room` bytes): the first that makes the step fit, at the
    least change; else the one that takes off most; None if none takes anything off."""
    best = None
    for flag, changed, values in step.changes(bucket):
        def peak(value: int, changed=changed) -> int:
            return changed(value).estimate().peak

        if not values:
            continue
        value = _largest(values, lambda value, peak=peak: peak(value) <= room)
        found = flag.format(values[-1] if value is None else value), peak(values[-1] if value is None else value)
        if value is not None:
            return *found, True
        if found[1] < (best[1] if best else step.estimate().peak):
            best = *found, False
    return best


@dataclasses.dataclass(frozen=True)
class Decoding:
    """All that generation's memory depends on: the model, rows decoded together, a row's positions, prompt and answer,
    and the padded length of a prompt."""

    model: Llama
    rows: int
    positions: int
    prompt: int
    quantisation: Kind = "none"

    def estimate(self) -> Memory:
        return memory_model.decode(self.model, self.rows, self.positions, self.prompt, block=BLOCK,
                                   joining=joining(self.rows), smallest=SMALLEST, quantisation=self.quantisation)

    def shapes(self) -> dict[str, Any]:
        """ShapeDtypeStructs of the model's trees."""
        return memory_model.tree_shapes(self.model, self.quantisation)

    def beside(self, room: int) -> int:
        """What of so many bytes decoding may take beside weights and adapter, less a margin."""
        return int((1 - MARGIN) * (room - sum(memory_model.weights(self.model, self.quantisation))))


def decoding(model: Llama, prompts: Sequence[np.ndarray], max_new_tokens: int, bucket: int, rows: int) -> Decoding:
    """Of these prompts' token ids, so many rows at a time; arguments as of `generate`."""
    longest = max(prompt.size for prompt in prompts)
    return Decoding(model, min(rows, len(prompts)), bucket_length(longest + max_new_tokens, bucket),
                    bucket_length(longest, bucket))


def largest_decoding(of: Decoding, room: int) -> int:
    """The most rows, in eights if there are eight, that take at most `room` bytes beside weights and adapter; 0
    if not even one does."""
    def fits(rows: int) -> bool:
        found = dataclasses.replace(of, rows=rows).estimate()
        return found.peak - found.weights - found.adapter <= room

    rows = _most(fits)
    return rows if rows < 8 else rows // 8 * 8


def free_memory() -> int | None:
    """Bytes that decoding may take on this machine's GPU beside what lies there, less a margin; None without a GPU."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    if not stats or not {"bytes_limit", "bytes_in_use"} <= stats.keys():
        return None
    return int((1 - MARGIN) * (stats["bytes_limit"] - stats["bytes_in_use"]))


def rows_that_fit(model: Llama, prompts: Sequence[np.ndarray], max_new_tokens: int, bucket: int) -> int | None:
    """How many rows this machine's GPU has room to decode beside what lies there; None without a GPU."""
    room = free_memory()
    if room is None:
        return None
    return max(1, largest_decoding(decoding(model, prompts, max_new_tokens, bucket, 1), room))


def parts(of: Memory) -> str:
    """Where the bytes go, in GiB."""
    named = {"weights": of.weights, "adapter": of.adapter, "optimizer and defense": of.optimizer,
             "kept of all layers": of.boundaries, "perturbations": of.perturbations, "gradients": of.gradients,
             "keys and values": of.cache}
    # Of decoding it is mostly a second, smaller cache.
    worst = ("logits", of.logits) if of.logits > of.layer else ("work" if of.cache else "one layer", of.layer)
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in (*named.items(), worst) if size)


def verdict(peak: int, target: Target) -> str:
    """Whether a program fits a card, and what JAX is to be told so that it does."""
    of = f"{target.name}: of {target.largest / GIB:.1f} GiB beside CUDA's own"
    if peak > target.largest:
        return f"{of}, {(peak - target.largest) / GIB:.1f} too few"
    if peak <= target.reserved:
        return f"{of}, it fits in the {target.reserved / GIB:.1f} that JAX takes when it starts"
    return (f"{of}, it fits, with {FRACTION}={math.ceil(100 * peak / target.total) / 100:.2f}: JAX takes "
            f"{target.reserved / GIB:.1f} when it starts, unless told")
