"""What `gpu_suite` found, as Markdown: tables, and whether each goal is met."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.benchmarks.gpu_parts import SuitePart, part_names
from experiments.benchmarks.our_step import differences
from jaxvaccine.memory import GIB
from jaxvaccine.report.tables import NONE, table

# Goals.
TIMES_PYTORCH, SHARE_OF_PRODUCTS = 2.0, 0.45
# Two orders of summation in bfloat16: how far loss and gradient may be apart, relative.
ATTENTION_LOSS, ATTENTION_GRADIENT = 1e-2, 5e-2

Results = Mapping[str, Mapping[str, Any]]


class _Found:
    """Figures of parts by name, None where there are none."""

    def __init__(self, part: SuitePart, results: Results):
        self.on_gpu, self.results = part.device == "gpu", results

    def verdict(self, holds: bool | None) -> str:
        """The goals are a GPU's."""
        return NONE if holds is None or not self.on_gpu else "met" if holds else "not met"

    def get(self, part: str, figure: str) -> Any:
        return self.results.get(part, {}).get("figures", {}).get(figure)

    def seconds(self, part: str, figure: str = "seconds") -> float | None:
        found = self.get(part, figure)
        return statistics.median(found) if found else None


def _text(value: float | None, form: str = ".2f", of: float = 1.0) -> str:
    return NONE if value is None else format(value / of, form)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def products_rate(found: _Found) -> float | None:
    """TFLOP/s of the fastest product on either side."""
    rates = [found.get(f"products:{side}", "tflops") for side in ("ours", "pytorch")]
    return max((rate for rate in rates if rate is not None), default=None)


def _steps(part: SuitePart, found: _Found) -> Iterator[list[str]]:
    rate = products_rate(found)
    for method in part.methods:
        ours, theirs = f"step:{method}:ours", f"step:{method}:pytorch"
        kinds = [(method, "seconds")]
        if found.get(ours, "seconds_with_probe") or found.get(theirs, "seconds_with_probe"):
            kinds.append((f"{method}, a step with its probe", "seconds_with_probe"))
        for name, kind in kinds:
            a, b = found.seconds(ours, kind), found.seconds(theirs, kind)
            times, usual = _ratio(b, a), kind == "seconds"
            flops = found.get(ours, "flops") if usual else None
            tflops = _ratio(flops, a and 1e12 * a)
            share = _ratio(tflops, rate)
            yield [name, _text(a, ".4g"), _text(b, ".4g"), _text(times),
                   found.verdict(None if times is None else times >= TIMES_PYTORCH), _text(tflops, ".3g"),
                   "" if not usual else _text(share, ".0%"),
                   "" if not usual else found.verdict(None if share is None else share >= SHARE_OF_PRODUCTS),
                   "" if not usual else _same(part, found, method)]


def _same(part: SuitePart, found: _Found, method: str) -> str:
    """Whether both sides' first steps are the same computation."""
    sides = [{name: found.get(f"step:{method}:{side}", name) for name in ("loss", "gradient_norm")}
             for side in ("ours", "pytorch")]
    if any(value is None for side in sides for value in side.values()):
        return NONE
    return "no: " + "; ".join(wrong) if (wrong := differences(part, method, *sides)) else "yes"


def _memory(part: SuitePart, found: _Found) -> Iterator[list[str]]:
    for method in part.methods:
        ours, theirs, predicted = f"step:{method}:ours", f"step:{method}:pytorch", f"prediction:{method}"
        peaks = [found.get(*of) for of in (
            (ours, "peak"), (predicted, "peak"), (ours, "compiled_peak"), (theirs, "peak"))]
        below = None if peaks[0] is None else peaks[0] <= part.memory_gb * 1e9
        yield [method, *(_text(peak, ".2f", GIB) for peak in peaks),
               _text(_ratio(peaks[0], peaks[1]) if found.on_gpu else None), found.verdict(below)]


def _attention(found: _Found) -> Iterator[str]:
    seconds = [found.get("attention", f"seconds_{kind}") for kind in ("xla", "cudnn")]
    if None in seconds:
        yield "Not measured.\n"
        return
    losses = [found.get("attention", f"loss_{kind}") for kind in ("xla", "cudnn")]
    gradient, cosine = (found.get("attention", name) for name in ("gradient_difference", "cosine"))
    equal = abs(losses[1] - losses[0]) <= ATTENTION_LOSS * abs(losses[0]) and gradient <= ATTENTION_GRADIENT
    yield table(["", "s, loss and gradient", "temporary, GiB", "loss"], [
        [kind, f"{s:.4g}", _text(found.get("attention", f"temporary_{kind}"), ".2f", GIB), f"{loss:.6g}"]
        for kind, s, loss in zip(("xla", "cudnn"), seconds, losses, strict=True)])
    yield (f"{found.get('attention', 'rows')} right-padded rows of at most {found.get('attention', 'length')} tokens. "
           f"The gradients differ by {gradient:.2g} of XLA's (cosine {cosine:.5f}). At most {ATTENTION_GRADIENT:g} of "
           f"it, and {ATTENTION_LOSS:g} of the loss, is the goal: {found.verdict(equal)}.\n")


def _generation(found: _Found) -> Iterator[str]:
    ours, theirs = (found.get(f"generation:{side}", "tokens_per_second") for side in ("ours", "pytorch"))
    first = [found.get(f"generation:{side}", "first_tokens") for side in ("ours", "pytorch")]
    equal = f"{sum(a == b for a, b in zip(*first, strict=True))}/{len(first[0])}" if all(first) else NONE
    yield table(["jaxvaccine, tokens/s", "transformers, tokens/s", "jaxvaccine / transformers", "equal first tokens"],
                [[_text(ours, ".0f"), _text(theirs, ".0f"), _text(_ratio(ours, theirs)), equal]])


def report(part: SuitePart, results: Results) -> str:
    """Everything that is in the results, of whatever parts there are."""
    found = _Found(part, results)
    device, jax, torch = (found.get(f"products:{side}", name) or NONE for side, name in (
        ("ours", "device"), ("ours", "jax"), ("pytorch", "torch")))
    lines = [
        f"# GPU suite: {part.model}, {part.dtype}\n",
        f"{device}; JAX {jax}, PyTorch {torch}. {part.rows} rows of {part.length} tokens, {part.supervised} "
        f"supervised, LoRA rank {part.rank} on {', '.join(part.targets)}. Ours: remat={part.remat}, attention by "
        f"{part.attention}. PyTorch: {part.pytorch_attention}, {'with' if part.checkpointing else 'without'} "
        f"checkpointing. Allocators capped at {part.memory_gb:g} GB. Products: {_text(products_rate(found), '.4g')} "
        f"TFLOP/s (ours {_text(found.get('products:ours', 'tflops'), '.4g')}, PyTorch "
        f"{_text(found.get('products:pytorch', 'tflops'), '.4g')}).\n",
        "## Training steps\n",
        table(["", "jaxvaccine, s", "PyTorch, s", "PyTorch / jaxvaccine", f"goal ≥ {TIMES_PYTORCH:g}", "TFLOP/s",
               "of the products'", f"goal ≥ {SHARE_OF_PRODUCTS:.0%}", "same computation"], _steps(part, found)),
        f"Medians of blocks of {part.block}, {part.steps} steps. FLOPs are those of matrix products, of "
        "rematerialisation too.\n",
        f"## Memory of a step, peak in GiB ({'of the allocator' if found.on_gpu else 'of the process'})\n",
        table(["", "jaxvaccine", f"predicted ({part.card or 'this machine'})", "compiled for this device", "PyTorch",
               "measured / predicted", f"within {part.memory_gb:g} GB"], _memory(part, found)),
        "## Attention\n", *_attention(found), "## Generation\n", *_generation(found)]
    failed = [f"- `{name}`: {value['failed'].splitlines()[0][:500]}" for name, value in results.items()
              if "failed" in value]
    missing = [name for name in part_names(part) if name not in results]
    if failed:
        lines += ["## Failed\n", *failed, ""]
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}.\n"]
    return "\n".join(lines)
