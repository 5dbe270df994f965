"""Tokens per second of generation: ours against transformers' generate, one prompt at a time and in batches.

  python -m experiments.benchmarks.generation

The papers' scripts decode one prompt at a time, 200 tokens at most, of 500 and more prompts. The same weights, prompts,
EOS and longest answer for all, on the same number of threads; transformers gets its prompts sorted by length,
left-padded, and its best batch size of several.
Needs torch (the `parity` extra).
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from absl import flags

from jaxvaccine import cli, data
from jaxvaccine.checkpoints import hugging_face, smollm2
from jaxvaccine.evaluation import generate
from jaxvaccine.evaluation.generate import available_cores
from jaxvaccine.experiment.config import Part, field, make
from jaxvaccine.report.tables import table

ONE = "transformers, one prompt at a time"


class Timing(NamedTuple):
    """One pass over some prompts."""

    answers: list[list[int]]
    seconds: float
    cpu_seconds: float

    def per_second(self, cpu: bool = False) -> float:
        return sum(map(len, self.answers)) / (self.cpu_seconds if cpu else self.seconds)


def timed(answer: Callable[[Sequence[np.ndarray]], list[list[int]]], prompts: Sequence[np.ndarray]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    answers = answer(prompts)
    return Timing(answers, time.perf_counter() - wall, time.process_time() - cpu)


def transformers_answers(directory: str, dtype: str, eos: int, max_new_tokens: int, threads: int
                         ) -> Callable[[Sequence[np.ndarray], int], list[list[int]]]:
    """(prompts, batch size) -> transformers' greedy answers, without EOS and what follows."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    def batch(rows: Sequence[np.ndarray]) -> list[list[int]]:
        length = max(row.size for row in rows)
        ids = torch.tensor(np.stack([np.pad(row, (length - row.size, 0), constant_values=eos) for row in rows])).long()
        mask = torch.tensor(np.stack([np.arange(length) >= length - row.size for row in rows])).long()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                                 eos_token_id=eos, pad_token_id=eos)
        answers = out[:, length:].tolist()
        return [answer[:answer.index(eos)] if eos in answer else answer for answer in answers]

    def answer(prompts: Sequence[np.ndarray], batch_size: int) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: -prompts[i].size)
        answers: list[list[int]] = [[]] * len(prompts)
        for first in range(0, len(order), batch_size):
            rows = order[first:first + batch_size]
            for i, found in zip(rows, batch([prompts[i] for i in rows]), strict=True):
                answers[i] = found
        return answers

    return answer


def compare(directory: str, source: str, count: int, singles: int, max_new_tokens: int, batch_sizes: Sequence[int],
            rows: Sequence[int], dtype: str, repeats: int) -> str:
    """The Markdown table, with what it was measured on."""
    threads = available_cores()
    model, frozen = hugging_face.load_model(directory, dtype=dtype)
    tokenizer = data.load_tokenizer(directory)
    examples = data.load_examples(source)
    if len(examples) < count:
        raise ValueError(f"--prompts: found {count}, expected at most the {len(examples)} of {source}")
    prompts = data.encode_prompts(tokenizer, examples[:count])
    theirs = transformers_answers(directory, dtype, tokenizer.eos_token_id, max_new_tokens, threads)

    def ours(prompts, batch_size):
        return [answer.tolist() for answer in generate(
            model, None, frozen, prompts, max_new_tokens=max_new_tokens, eos_ids=(tokenizer.eos_token_id,),
            batch_size=batch_size, bucket=8)]

    cases = {ONE: (lambda p: theirs(p, 1), prompts[:singles])}
    for size in batch_sizes:
        cases[f"transformers, batches of {size}"] = (lambda p, size=size: theirs(p, size), prompts)
    for size in rows:
        cases[f"jaxvaccine, {size} rows"] = (lambda p, size=size: ours(p, size), prompts)
    theirs(prompts[:2], 2)
    first = {name: timed(*case).seconds for name, case in cases.items() if name.startswith("jaxvaccine")}
    load = os.getloadavg()[0]
    timings: dict[str, list[Timing]] = {name: [] for name in cases}
    for _ in range(repeats):  # in turn, so that whatever else the machine does hits all alike
        for name, case in cases.items():
            timings[name].append(timed(*case))

    def speed(name: str, cpu: bool = False) -> float:
        return statistics.median(timing.per_second(cpu) for timing in timings[name])

    best = max((name for name in cases if name.startswith("transformers, b")), key=speed)
    reference = timings[ONE][0].answers
    lines = []
    for name in cases:
        answers = timings[name][0].answers
        equal = sum(a == b for a, b in zip(answers, reference, strict=False))
        lines.append([name, f"{speed(name):.1f}", f"{speed(name) / speed(ONE):.1f}", f"{speed(name) / speed(best):.2f}",
                      f"{speed(name, cpu=True):.1f}", f"{speed(name, True) / speed(ONE, True):.1f}",
                      f"{speed(name, True) / speed(best, True):.2f}", f"{equal}/{len(reference)}"])
    compiling = ", ".join(f"{seconds:.0f} s ({name})" for name, seconds in first.items())
    lengths = [len(answer) for answer in timings[best][0].answers]
    return "\n".join([
        f"{count} prompts of {source} ({singles} of them one at a time), {min(p.size for p in prompts)} to "
        f"{max(p.size for p in prompts)} tokens; up to {max_new_tokens} new ones, on average "
        f"{statistics.mean(lengths):.0f}; {dtype}, {jax.devices()[0].platform}, {threads} threads, load "
        f"{load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end; median of {repeats}, in turn. "
        f"The first pass, with compilation, took {compiling}.\n",
        table(["", "tokens/s", "/ one at a time", "/ best batches", "tokens per CPU second", "/ one at a time",
               "/ best batches", "equal to one at a time"], lines)])


@dataclasses.dataclass(frozen=True)
class GenerationConfig(Part):
    """Benchmark."""

    model: str = field("", "Hugging Face directory; SmolLM2-135M-Instruct unless given.")
    data: str = field("embedded_benign@train", "Prompts: kind:path-or-hub-id@split[start:stop].")
    prompts: int = field(500, "How many of them.", at_least=1)
    single_prompts: int = field(8, "How many of these transformers answers one at a time.", at_least=1)
    max_new_tokens: int = field(200, "Longest answer.", at_least=1)
    batch_sizes: tuple[str, ...] = field(("64", "128"), "Prompts that transformers answers together.")
    rows: tuple[str, ...] = field(("256",), "Prompts that we answer together.")
    dtype: Literal["float32", "bfloat16"] = field("float32", "Type of weights and computation.")
    repeats: int = field(1, "Timed passes.", at_least=1)


def call(values: flags.FlagValues) -> None:
    with cli.flag_errors(""):
        config = make(GenerationConfig, cli.given(cli.Section(GenerationConfig), values))
        print(compare(
            config.model or str(smollm2.fetch()), config.data, config.prompts,
            min(config.single_prompts, config.prompts), config.max_new_tokens,
            [int(size) for size in config.batch_sizes], [int(size) for size in config.rows], config.dtype,
            config.repeats))


VERB = cli.Verb(__doc__, (cli.Section(GenerationConfig),), call)

if __name__ == "__main__":
    cli.call("generation", VERB)
