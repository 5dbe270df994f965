"""Conversations with tools: the model's turn, the environment's reply, and so on, for many requests at once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxvaccine.data import agent_tasks, agent_world
from jaxvaccine.data.batching import power_of_two
from jaxvaccine.data.prompts import Example, Prompt, PromptForm, as_prompt
from jaxvaccine.data.tokenizing import encode_prompts
from jaxvaccine.evaluation.answers import decode_answer
from jaxvaccine.evaluation.generate import generate
from jaxvaccine.evaluation.sampling import Sampling
from jaxvaccine.llama import Llama

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def longest_context(example: Example) -> Example:
    """The example with a conversation as input than which none that is shown to a model is longer."""
    lines = ["call move mattress pantry stable", "reply nowhere"] * (agent_tasks.MAX_TURNS - 1)
    return example._replace(input=agent_tasks.context(lines))


def _filled(active: Sequence[int], total: int) -> frozenset[int]:
    """The active numbers and as many others as make a power of two, or all: generation compiles for every number of
    rows, and there are few such numbers."""
    size = min(total, power_of_two(len(active)))
    known = set(active)
    others = (i for i in range(total) if i not in known)
    return frozenset(known | {i for i, _ in zip(others, range(size - len(known)), strict=False)})


def converse(model: Llama, adapter, frozen, tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], *,
             max_new_tokens: int, eos_ids: Sequence[int], batch_size: int, bucket: int, sampling: Sampling,
             progress: bool, answered: Mapping[int, str], keep: Callable[[Mapping[int, str]], None],
             prompt: Prompt | PromptForm) -> list[str]:
    """A transcript (`agent_world.replay`) of a conversation about every example's request.

    In every round all conversations that go on have one turn. A turn that is a call is carried out; any other is the
    last. There are at most `agent_tasks.MAX_TURNS` turns, so that a model that calls on and on has no last one. A
    turn's draws depend on the seed, the turn and the request's number alone.

    Args:
      examples: requests that `agent_tasks.read_request` reads.
      max_new_tokens: longest turn.
      others: as of `answer_prompts`; keep is called as conversations end.
    """
    requests = [agent_tasks.read_request(example.instruction) for example in examples]
    states = [agent_tasks.start(request) for request in requests]
    lines: list[list[str]] = [[] for _ in examples]
    found = dict(answered)
    active = [i for i in range(len(examples)) if i not in found]
    for turn in range(agent_tasks.MAX_TURNS):
        if not active:
            break
        # What stands in for a number of rows is no longer than what goes on: it is asked its first turn again.
        going = set(active)
        prompts = encode_prompts(tokenizer, [e._replace(input=agent_tasks.context(lines[i] if i in going else []))
                                             for i, e in enumerate(examples)], prompt=prompt)
        drawn = dataclasses.replace(sampling, seed=(sampling.seed + turn * 0x9E3779B1) % 2**32)
        asked = _filled(active, len(examples))
        turns = generate(model, adapter, frozen, prompts, max_new_tokens=max_new_tokens, eos_ids=eos_ids,
                         batch_size=batch_size, bucket=bucket, sampling=drawn, progress=progress,
                         answered=[i for i in range(len(examples)) if i not in asked])
        texts = {i: decode_answer(tokenizer, turns[i], chat=as_prompt(prompt).form == "chat") for i in active}
        ended = _take(texts, states, lines, turn + 1 == agent_tasks.MAX_TURNS)
        found.update(ended)
        keep(ended)
        active = [i for i in active if i not in ended]
    return [found[i] for i in range(len(examples))]


def _take(texts: Mapping[int, str], states: list[agent_world.State], lines: list[list[str]], last: bool
          ) -> dict[int, str]:
    """Carries the turns of a round out; returns the transcripts of the conversations that ended with it."""
    ended = {}
    for i, text in texts.items():
        turn = agent_world.one_line(text)
        lines[i].append(turn)
        call = agent_world.read_call(turn)
        if call is not None:
            states[i], reply = agent_world.execute(states[i], call)
            lines[i].append(reply)
        if call is None or last:
            ended[i] = "\n".join(lines[i])
    return ended
