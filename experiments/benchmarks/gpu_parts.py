"""What `gpu_suite` measures, one part at a time, each in a process of its own: only one side is in the card's memory.

  python -m experiments.benchmarks.gpu_parts REQUEST.json ANSWER.json

A part's function takes the settings and what earlier parts found, and returns JSON values.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import costs, random_weights
from experiments.benchmarks.memory import SIZES
from experiments.benchmarks.our_step import SEED, Ours, StepPart, program
from experiments.benchmarks.step import BLOCK as LOSS_BLOCK
from jaxvaccine import llama
from jaxvaccine.evaluation import generate
from jaxvaccine.evaluation.generate import available_cores
from jaxvaccine.experiment import stage
from jaxvaccine.experiment.config import field, make
from jaxvaccine.experiment.methods import ALIGNMENT
from jaxvaccine.json_files import read_json, write_json
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.memory import CARDS, card_device, program_memory

Figures = dict[str, Any]
WARM_UP = 3  # steps before those that are timed
PROBES = 3  # timed steps in which T-Vaccine's probe falls due
PRODUCTS = 20  # pairs of products in a timed loop


@dataclasses.dataclass(frozen=True)
class SuitePart(StepPart):
    """What is measured."""

    model: str = field("llama-2-7b", f"{', '.join(SIZES)}, or a folder whose config.json is read; weights "
                       "are random.")
    methods: tuple[str, ...] = field(tuple(ALIGNMENT), f"Of {', '.join(ALIGNMENT)}.")
    length: int = field(256, "Tokens of a row.", at_least=2)
    supervised: int = field(128, "How many of them are supervised, at a row's end.", at_least=1)
    dtype: Literal["float32", "bfloat16"] = field(
        "bfloat16", "Type of weights and computation; the adapter is float32.")
    checkpointing: bool = field(True, "Whether PyTorch's side computes every layer anew (torch.utils.checkpoint).")
    device: Literal["gpu", "cpu"] = field("gpu", "Where it runs; on a CPU it shows that the suite works, and no more.")
    memory_gb: float = field(24.0, "GB (10^9 bytes) that a side's allocator may take.", above=0)
    card: Literal[("", *CARDS)] = field(
        "rtx_4090", "Card for which the compiler predicts a step's memory; empty: this machine.")
    steps: int = field(20, "Timed steps, in blocks that are waited for at their ends alone.", at_least=1)
    block: int = field(5, "Steps of a block.", at_least=1)
    square: int = field(8192, "Side of the largest square product.", at_least=1)
    attention_rows: int = field(4, "Rows of the comparison of XLA's and cuDNN's attention.", at_least=1)
    attention_length: int = field(1024, "Tokens of the longest of these rows.", at_least=2)
    prompts: int = field(64, "Prompts of generation.", at_least=1)
    prompt_length: int = field(64, "Tokens of the longest of them; the shortest has half of that.", at_least=2)
    generation_rows: int = field(32, "Rows that are decoded together, on both sides.", at_least=1)
    new_tokens: int = field(128, "Tokens of each answer; none ends before.", at_least=1)


def part_names(part: SuitePart) -> list[str]:
    """All parts, in the order in which they are measured."""
    steps = [f"step:{method}:{side}" for method in part.methods for side in ("ours", "pytorch")]
    return ["products:ours", "products:pytorch", *steps, *(f"prediction:{method}" for method in part.methods),
            "attention", "generation:ours", "generation:pytorch"]


def product_shapes(part: SuitePart) -> list[tuple[int, int, int]]:
    """(m, k, n) of a step's products of activations and weights, and of a large square."""
    of, rows = part.architecture(), part.rows * part.length
    pairs = {(of.hidden_size, of.num_heads * of.head_dim), (of.hidden_size, of.intermediate_size)}
    return [(part.square,) * 3, *((rows, *pair) for pair in sorted(pairs))]


def _rates(part: SuitePart, timed: Callable[[int, int, int], float]) -> Figures:
    """timed: (m, k, n) -> seconds of PRODUCTS products m × k × n and as many m × n × k."""
    rates = {"×".join(map(str, shape)): 2 * PRODUCTS * 2 * np.prod(shape, dtype=float) / timed(*shape) / 1e12
             for shape in product_shapes(part)}
    return {"tflops": max(rates.values()), "of_shapes": rates}


def products_ours(part: SuitePart, earlier: Mapping[str, Figures]) -> Figures:
    """TFLOP/s of matrix products by XLA, in a loop on the device."""
    del earlier
    dtype = jnp.dtype(part.dtype)

    @jax.jit
    def loop(x, w, back):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: (x @ w) @ back, x)

    def timed(m: int, k: int, n: int) -> float:
        keys = jax.random.split(jax.random.key(0), 3)
        operands = [(jax.random.normal(key, shape, dtype) * shape[0] ** -0.5).astype(dtype)
                    for key, shape in zip(keys, ((m, k), (k, n), (n, k)), strict=True)]
        return _best(lambda: jax.block_until_ready(loop(*operands)))

    return {**_rates(part, timed), "device": jax.devices()[0].device_kind, "platform": jax.default_backend(),
            "jax": jax.__version__}


def products_pytorch(part: SuitePart, earlier: Mapping[str, Figures]) -> Figures:
    """The same by PyTorch."""
    del earlier
    import torch

    device, dtype = _torch_device(part), getattr(torch, part.dtype)

    def timed(m: int, k: int, n: int) -> float:
        x, w, back = (torch.randn(shape, device=device, dtype=dtype) * shape[0] ** -0.5
                      for shape in ((m, k), (k, n), (n, k)))

        def loop():
            y = x
            for _ in range(PRODUCTS):
                y = (y @ w) @ back
            _torch_wait(device)

        return _best(loop)

    return {**_rates(part, timed), "torch": torch.__version__}


def _best(run: Callable[[], Any], repeats: int = 3) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _torch_device(part: SuitePart) -> str:
    """PyTorch's device, with its allocator capped.

    Raises:
      RuntimeError: PyTorch sees no GPU.
    """
    import torch

    if part.device == "cpu":
        torch.set_num_threads(available_cores())
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__}: found no GPU, expected a build for CUDA and a card")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, part.memory_gb * 1e9 / total))
    return "cuda"


def _torch_wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _timed_steps(part: SuitePart, name: str, side: Any) -> Figures:
    """Seconds of a step, in blocks between whose ends the host waits for nothing; what the first step found."""
    started = time.perf_counter()
    side.step()
    side.wait()
    first = {"first_step_seconds": time.perf_counter() - started, **side.last()._asdict()}
    for _ in range(WARM_UP - 1):
        side.step()
    side.wait()
    seconds, left = [], part.steps
    while left:
        steps = min(part.block, left)
        started = time.perf_counter()
        for _ in range(steps):
            side.step()
        side.wait()
        seconds.append((time.perf_counter() - started) / steps)
        left -= steps
    figures = {**first, "steps": part.steps, "seconds": seconds}
    if name == "t_vaccine":
        due = []
        for _ in range(PROBES):
            side.start_again()
            side.wait()
            started = time.perf_counter()
            side.step()
            side.wait()
            due.append(time.perf_counter() - started)
        figures["seconds_with_probe"] = due
    return figures


def step_ours(part: SuitePart, earlier: Mapping[str, Figures], name: str) -> Figures:
    """A training step of ours: time, FLOPs, memory."""
    del earlier
    model = part.llama()
    method = part.method(name, part.probe_every)
    started = time.perf_counter()
    side = Ours(part, method, model, random_weights.frozen(model))
    compiling = time.perf_counter() - started
    of = side.compiled.memory_analysis()
    figures = {"compile_seconds": compiling, **_timed_steps(part, name, side), **_peak_of_jax(),
               "compiled_peak": of.peak_memory_in_bytes}
    blocks, used = (-(-part.rows * tokens // LOSS_BLOCK) for tokens in (part.length, part.supervised))
    flops = {}
    for kind, remat in (("flops", part.remat), ("flops_without_remat", "none")):
        counted = program(part, method, model.clone(remat=remat, attention="xla"))  # a kernel can't be looked into
        flops[kind] = costs.count(counted.train_step, *counted.shapes, layers=model.config.num_layers,
                                  share_of_blocks=used / blocks)[0].flops
    return {**figures, **flops}


def _peak_of_jax() -> Figures:
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"peak": stats["peak_bytes_in_use"], "peak_of": "allocator", "limit": stats.get("bytes_limit")}
    return {"peak": stage.peak_resident_memory(), "peak_of": "process"}


def step_pytorch(part: SuitePart, earlier: Mapping[str, Figures], name: str) -> Figures:
    """A training step of PyTorch's; T-Vaccine draws what ours drew, if that was measured before."""
    import torch

    from experiments.benchmarks.pytorch_step import Theirs, make_model

    device = _torch_device(part)
    side = Theirs(part, part.method(name, part.probe_every), make_model(part, device))
    side.draws = earlier.get(f"step:{name}:ours", {}).get("active_layers")
    if device == "cpu":
        return {**_timed_steps(part, name, side), "peak": stage.peak_resident_memory(), "peak_of": "process"}
    torch.cuda.reset_peak_memory_stats()
    return {**_timed_steps(part, name, side), "peak": torch.cuda.max_memory_allocated(), "peak_of": "allocator",
            "reserved": torch.cuda.max_memory_reserved()}


def prediction(part: SuitePart, earlier: Mapping[str, Figures], name: str) -> Figures:
    """The step's peak by the compiler, for a card that need not be there (`jaxvaccine.memory`)."""
    del earlier
    of = program(part, part.method(name, part.probe_every), part.llama())
    memory = program_memory(of.train_step, *of.shapes, device=card_device(part.card) if part.card else None)
    return {"card": part.card or jax.default_backend(), "peak": memory.peak, "temporary": memory.temporary}


def attention(part: SuitePart, earlier: Mapping[str, Figures]) -> Figures:
    """XLA's attention against cuDNN's: loss and gradient of right-padded rows, and time."""
    del earlier
    rng, rows, length = np.random.default_rng(SEED), part.attention_rows, part.attention_length
    ids = rng.integers(0, part.architecture().vocab_size, (rows, length), np.int32)
    lengths = np.linspace(length, max(2, length // 2), rows).astype(int)[:, None]
    counts = np.arange(length) < lengths
    batch = jax.device_put({"input_ids": np.where(counts, ids, 0), "attention_mask": counts.astype(np.int32),
                            "labels": np.where(counts & (np.arange(length) >= lengths // 2), ids, np.int32(-100))})
    model = part.llama(attention="xla")
    frozen, adapter = random_weights.frozen(model), jax.device_put(random_weights.adapter(model))
    found, gradients = {"rows": rows, "length": length}, {}
    for kind in ("xla", "cudnn"):
        loss_fn = causal_lm_loss(model.clone(attention=kind))
        fn = jax.jit(jax.value_and_grad(lambda *trees, loss_fn=loss_fn: loss_fn(*trees)[0])).lower(
            adapter, frozen, batch).compile()
        loss, gradients[kind] = jax.device_get(fn(adapter, frozen, batch))
        found |= {f"loss_{kind}": float(loss), f"temporary_{kind}": fn.memory_analysis().temp_size_in_bytes,
                  f"seconds_{kind}": _time_block(lambda fn=fn: fn(adapter, frozen, batch), part.block)}
    xla, cudnn = (np.concatenate([leaf.ravel().astype(np.float64) for leaf in jax.tree.leaves(gradients[kind])])
                  for kind in ("xla", "cudnn"))
    return {**found, "gradient_difference": float(np.linalg.norm(cudnn - xla) / np.linalg.norm(xla)),
            "cosine": float(cudnn @ xla / np.linalg.norm(cudnn) / np.linalg.norm(xla))}


def _time_block(run: Callable[[], Any], count: int) -> float:
    jax.block_until_ready(run())
    started = time.perf_counter()
    for _ in range(count):
        found = run()
    jax.block_until_ready(found)
    return (time.perf_counter() - started) / count


def _prompts(part: SuitePart) -> list[np.ndarray]:
    rng, of = np.random.default_rng(SEED), part.architecture()
    sizes = rng.integers(part.prompt_length // 2, part.prompt_length + 1, part.prompts)
    return [rng.integers(0, of.vocab_size, size, np.int32) for size in sizes]


def _generation(answer: Callable[[Sequence[np.ndarray]], Sequence[Sequence[int]]], part: SuitePart) -> Figures:
    """Tokens per second of a second pass; the first compiles."""
    prompts, seconds = _prompts(part), []
    for _ in range(2):
        started = time.perf_counter()
        answers = answer(prompts)
        seconds.append(time.perf_counter() - started)
    return {"tokens_per_second": sum(map(len, answers)) / seconds[1], "first_seconds": seconds[0],
            "first_tokens": [int(tokens[0]) for tokens in answers]}


def generation_ours(part: SuitePart, earlier: Mapping[str, Figures]) -> Figures:
    """Greedy generation by ours."""
    del earlier
    model = llama.Llama(part.architecture(), None, jnp.dtype(part.dtype).type)
    frozen = random_weights.frozen(model)
    return {**_generation(lambda prompts: generate(
        model, None, frozen, prompts, max_new_tokens=part.new_tokens, eos_ids=(), batch_size=part.generation_rows),
        part), **_peak_of_jax()}


def generation_pytorch(part: SuitePart, earlier: Mapping[str, Figures]) -> Figures:
    """Greedy generation by transformers, batches of prompts of similar lengths, left-padded."""
    del earlier
    import torch

    from experiments.benchmarks.pytorch_step import make_base

    device = _torch_device(part)
    base = make_base(part.architecture(), part.dtype, device, part.pytorch_attention).eval()
    base.generation_config.eos_token_id = None

    def answer(prompts: Sequence[np.ndarray]) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: -prompts[i].size)
        answers: list[list[int]] = [[]] * len(prompts)
        for first in range(0, len(order), part.generation_rows):
            numbers = order[first:first + part.generation_rows]
            length = max(prompts[i].size for i in numbers)
            ids = torch.tensor(np.stack([np.pad(prompts[i], (length - prompts[i].size, 0)) for i in numbers])).long()
            mask = torch.tensor(np.stack([np.arange(length) >= length - prompts[i].size for i in numbers])).long()
            with torch.inference_mode():
                out = base.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=part.new_tokens,
                                    do_sample=False, pad_token_id=0)
            for i, tokens in zip(numbers, out[:, length:].tolist(), strict=True):
                answers[i] = tokens
        return answers

    figures = _generation(answer, part)
    return {**figures, "peak": torch.cuda.max_memory_allocated()} if device == "cuda" else figures


def measure(name: str, part: SuitePart, earlier: Mapping[str, Figures]) -> Figures:
    """The figures of a part, by its name."""
    kind, *rest = name.split(":")
    functions: dict[str, Callable[..., Figures]] = {
        "products:ours": products_ours, "products:pytorch": products_pytorch, "attention": attention,
        "generation:ours": generation_ours, "generation:pytorch": generation_pytorch}
    if kind == "step":
        functions[name] = functools.partial({"ours": step_ours, "pytorch": step_pytorch}[rest[1]], name=rest[0])
    if kind == "prediction":
        functions[name] = functools.partial(prediction, name=rest[0])
    return functions[name](part, earlier)


def measured(name: str, values: Mapping[str, Any], earlier: Mapping[str, Figures]) -> dict[str, Any]:
    """{"figures": …}, or {"failed": what it says} where the part does: whatever it is, the suite goes on."""
    try:
        part = make(SuitePart, values)
        on_device = name == "attention" or name.endswith("ours")
        if on_device and part.device != jax.default_backend():
            raise RuntimeError(f"JAX {jax.__version__}: found a {jax.default_backend()}, expected a {part.device}")
        return {"figures": measure(name, part, earlier)}
    except Exception as error:  # out of memory is a RuntimeError here, an exception of PyTorch's own there
        return {"failed": f"{type(error).__name__}: {error}"}


def main(request: str, answer: str) -> None:
    found = measured(*(read_json(request)[name] for name in ("name", "values", "earlier")))
    write_json(Path(answer), json.loads(json.dumps(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
