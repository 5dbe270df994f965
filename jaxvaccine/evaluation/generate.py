"""Decoding in batches, with a key-value cache: a row's tokens do not depend on its padding or neighbours.

Here is which prompt is where and when; `decoding` has what runs on the device.
"""

import functools
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import numpy as np

from jaxvaccine.data.batching import bucket_length, pad_rows, power_of_two
from jaxvaccine.evaluation import decoding
from jaxvaccine.evaluation.sampling import GREEDY, Sampling
from jaxvaccine.llama import Llama

# Tokens between two looks at which rows have ended. More waste work on ended rows; fewer, on looking.
BLOCK = 8
# Waiting prompts join when a sixteenth of the rows is free.
_JOIN = 16
# A smaller batch is hardly faster: a step takes as long as reading the weights.
SMALLEST = 8
# With fewer common tokens, attention to one more segment takes longer than reading them with each prompt.
_SHARED_LEAST = 16
# A worker of fewer rows is not worth it: each worker reads all weights for every token.
_WORKER_ROWS = 64
_FREE = -1


def _checked_prompts(model: Llama, prompts, max_new_tokens: int) -> list[np.ndarray]:
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    arrays = [np.asarray(prompt) for prompt in prompts]
    for i, prompt in enumerate(arrays):
        if prompt.ndim != 1 or not prompt.size:
            raise ValueError(f"generate: prompt {i}: found shape {prompt.shape}, expected [T] with at least one token")
        if not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(f"generate: prompt {i}: found dtype {prompt.dtype}, expected integer token ids")
        if prompt.size + max_new_tokens > limit:
            raise ValueError(f"generate: prompt {i}: found {prompt.size} tokens + {max_new_tokens} new ones, "
                             f"expected at most the model's max_position_embeddings {limit}")
        wrong = prompt[(prompt < 0) | (prompt >= vocab)]
        if wrong.size:
            raise ValueError(f"generate: prompt {i}: found token id {wrong[0]}, expected 0 <= id < vocab_size {vocab}")
    return arrays


def _shared_length(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens all prompts begin with, or 0 if reading them once does not pay. Each keeps one of its own."""
    shortest = min(prompt.size for prompt in prompts)
    begins = np.stack([prompt[:shortest - 1] for prompt in prompts])
    length = int(np.argmin(np.append((begins == begins[0]).all(axis=0), False)))
    return length if len(prompts) > 1 and length >= _SHARED_LEAST else 0


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def joining(batch_size: int) -> int:
    """How many waiting prompts are read together, of so many rows."""
    return -(-batch_size // _JOIN)


def _num_workers(batch_size: int) -> int:
    """How many batches are decoded side by side: XLA's CPU backend computes attention to the cache on one core."""
    if jax.default_backend() != "cpu":
        return 1
    return max(1, min(available_cores(), batch_size // _WORKER_ROWS))


class _Steps(NamedTuple):
    """Functions of `decoding`, bound to what is the same for all rows."""

    empty: Callable
    admit: Callable
    decode: Callable
    keep: Callable


def _bind(model: Llama, adapter, frozen, shared_P: np.ndarray, eos_ids_E: np.ndarray, sampling: Sampling,
          lock: threading.Lock) -> _Steps:
    def locked(function, *args, **kwargs):
        def call(*more, **others):
            # Two threads would compile twice. What is compiled returns at once, and computes outside of the lock.
            with lock:
                return function(*args, *more, **kwargs, **others)
        return call

    model = stepwise = model.clone(remat="none")
    shared = (decoding.read_shared(model, adapter, frozen, shared_P),) if shared_P.size else ()
    trees = adapter, frozen, shared
    if jax.default_backend() == "cpu":
        stepwise, trees = model.clone(unroll=True), decoding.unrolled(model, adapter, frozen, shared)
    # `empty` computes before it returns: with the lock, one worker would wait for the other's gigabytes of zeros.
    return _Steps(functools.partial(decoding.empty, stepwise),
                  locked(decoding.admit, model, adapter, frozen, shared, eos_ids_E, sampling=sampling),
                  locked(decoding.decode, stepwise, *trees, eos_ids_E, sampling=sampling), locked(decoding.keep))


# (number of a prompt, its answer so far, how many tokens of it were looked at before): how many of them are its answer,
# None where it goes on.
Stops = Callable[[int, np.ndarray, int], int | None]


def _answer(steps: _Steps, prompts: Sequence[np.ndarray], waiting: list[int], batch_size: int, max_new_tokens: int,
            bucket: int, stops: Stops | None) -> Iterator[tuple[dict[int, np.ndarray], int]]:
    """One worker's answers, to the prompts whose numbers are `waiting`, the longest last.

    Yields after each block: the answers that ended with it, by number, and how many tokens the others have so far.
    """
    def capacity(numbers: Sequence[int]) -> int:
        # A row that ends within a block may have no room for all of it: what is written over is its own.
        return bucket_length(max(prompts[i].size for i in numbers) + max_new_tokens, bucket)

    owners = [_FREE] * batch_size  # which prompt each row is at
    seen: dict[int, int] = {}
    block, together = min(BLOCK, max_new_tokens), joining(batch_size)
    room = capacity(range(len(prompts)))  # of all workers, so that one program is compiled
    rows, cache = steps.empty(batch=batch_size, capacity=room, max_new_tokens=max_new_tokens)
    while waiting or any(i != _FREE for i in owners):
        while waiting and owners.count(_FREE) >= min(together, len(waiting)):
            slots = [b for b, i in enumerate(owners) if i == _FREE][:min(together, len(waiting))]
            taken = [waiting.pop() for _ in slots]
            for b, i in zip(slots, taken, strict=True):
                owners[b] = i
            filler = together - len(slots)
            rows, cache = steps.admit(
                rows, cache, *pad_rows([prompts[i] for i in taken], together, bucket),
                np.asarray(taken + [0] * filler, np.int32), np.asarray(slots + [len(owners)] * filler, np.int32))
        active = [b for b, i in enumerate(owners) if i != _FREE]
        size = len(owners)
        if not waiting and len(active) <= size // 2:
            size = min(size, max(SMALLEST, power_of_two(len(active))))
        needed = capacity([owners[b] for b in active] + waiting)
        if size < len(owners) or needed <= room // 2:
            kept = (active + [b for b, i in enumerate(owners) if i == _FREE])[:size]
            room = needed if needed <= room // 2 else room
            rows, cache = steps.keep(rows, cache, np.asarray(kept, np.int32), capacity=room)
            owners = [owners[b] for b in kept]
        rows, cache = steps.decode(rows, cache, steps=block)
        tokens_BxN, counts_B, ended_B, finite_B = jax.device_get((rows.tokens, rows.counts, rows.ended, rows.finite))
        ended, stopped_B = {}, np.zeros(size, bool)
        for b, i in enumerate(owners):
            if i == _FREE:
                continue
            count = int(counts_B[b])
            if stops and (stop := stops(i, tokens_BxN[b, :count], seen.get(i, 0))) is not None:
                ended[i], owners[b], stopped_B[b] = tokens_BxN[b, :stop].copy(), _FREE, True
                continue
            seen[i] = count
            if not ended_B[b]:
                continue
            if not finite_B[b]:
                raise FloatingPointError(f"generate: prompt {i}: the model's logits are not finite after "
                                         f"{count} tokens: its weights or activations overflowed")
            ended[i], owners[b] = tokens_BxN[b, :count].copy(), _FREE
        if stopped_B.any():
            rows = rows._replace(ended=rows.ended | stopped_B)
        yield ended, sum(int(counts_B[b]) for b, i in enumerate(owners) if i != _FREE)


def generate(model: Llama, adapter, frozen, prompts: Sequence[np.ndarray], *, max_new_tokens: int,
             eos_ids: Sequence[int], batch_size: int = 32, bucket: int = 64, sampling: Sampling = GREEDY,
             progress: bool = False, answered: Collection[int] = (),
             keep: Callable[[Mapping[int, np.ndarray]], None] = lambda ended: None,
             stops: Stops | None = None) -> list[np.ndarray]:
    """The most likely next token, or a drawn one, again and again, for every prompt.

    What all prompts begin with is read once. Prompts are taken longest first, right-padded to a multiple of ``bucket``.
    At most ``batch_size`` rows are decoded together, in blocks of BLOCK tokens; after a block, rows that have ended
    leave, and waiting prompts take their places. When none waits any more and half of the rows have ended, the others
    go on in a smaller batch; when half of the cache's positions are enough for all that is left, the rest is given up.
    Reading prompts is compiled once per bucket, a step once per size of the batch and of the cache. On a CPU, the
    weights are held twice meanwhile, and a large batch is split among threads, one per core.

    Args:
      model: the architecture; its remat policy is ignored.
      adapter: LoRA tree, leaves stacked [L, ...]; None for the bare base.
      frozen: base weights, layers stacked [L, ...].
      prompts: token ids, integer arrays [T_i].
      max_new_tokens: most tokens generated per prompt.
      eos_ids: any of these ends a row; none never does.
      batch_size: rows decoded together; fewer if there are fewer prompts.
      bucket: multiple, in tokens, to which prompts are padded.
      sampling: how a token is chosen. Draws derive from its seed, the prompt's place in ``prompts`` and the token's
        place in the answer.
      progress: shows a bar with prompts done, time left and generated tokens per second.
      answered: numbers of prompts, from 0, that are left out: what an interrupted call has kept. The others' answers do
        not depend on it.
      keep: called with {number: answer} of the prompts that have ended, as they do; by one thread at a time.
      stops: asked after each block of every row, with the prompt's number, its answer so far and how many tokens of it
        it was asked of before; how many tokens the answer has if it ends within it, or None.

    Returns:
      For each prompt, in the given order, its new tokens, int32 [at most max_new_tokens], without EOS; none for those
      that were answered before.

    Raises:
      ValueError: before anything runs, for a prompt that is empty, does not fit the model's positions together with
        its answer, or holds an id outside the vocabulary; for an EOS id outside it; for a size below 1.
      FloatingPointError: the model's logits are not finite.
    """
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "bucket": bucket}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"generate: {name}: found {value}, expected at least 1")
    for eos in eos_ids:
        if not isinstance(eos, int | np.integer) or not 0 <= eos < model.config.vocab_size:
            raise ValueError(f"generate: eos_ids: found {eos!r}, expected 0 <= id < vocab_size "
                             f"{model.config.vocab_size}")
    prompts = _checked_prompts(model, prompts, max_new_tokens)
    if not prompts:
        return []
    from tqdm import tqdm

    # The longest is taken first, from the end.
    done = frozenset(answered)
    order = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: prompts[i].size)
    answers: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    if not order:
        return answers
    common, lock, stopped = _shared_length(prompts), threading.Lock(), threading.Event()
    steps = _bind(model, adapter, frozen, prompts[0][:common], np.asarray(tuple(eos_ids), np.int32), sampling, lock)
    prompts = [prompt[common:] for prompt in prompts]
    batch_size = min(batch_size, len(order))
    workers = _num_workers(batch_size)
    tokens = [0] * workers

    def work(worker: int, bar: tqdm) -> None:
        finished = 0
        for ended, under_way in _answer(steps, prompts, order[worker::workers], -(-batch_size // workers),
                                        max_new_tokens, bucket, stops):
            if stopped.is_set():
                return
            finished += sum(answer.size for answer in ended.values())
            with lock:
                for i, answer in ended.items():
                    answers[i] = answer
                if ended:
                    keep(ended)
                tokens[worker] = finished + under_way
                bar.update(len(ended))
                speed = sum(tokens) / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{speed:.1f} tokens/s")

    with tqdm(total=len(prompts), initial=len(prompts) - len(order), desc="generate", unit="prompt",
              disable=not progress) as bar:
        if workers == 1:
            work(0, bar)
            return answers
        x64 = jax.config.jax_enable_x64  # a thread does not inherit the caller's

        def thread(worker: int) -> None:
            with jax.enable_x64(x64):
                work(worker, bar)

        with ThreadPoolExecutor(workers) as pool:
            threads = [pool.submit(thread, worker) for worker in range(workers)]
            try:
                wait(threads, return_when=FIRST_EXCEPTION)
            finally:
                stopped.set()
        for done in threads:
            done.result()
    return answers
