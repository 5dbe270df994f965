"""Text to token ids: which tokens are the prompt, which the answer, and what is supervised."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxvaccine.data import chat
from jaxvaccine.data.accounts import Fate, place
from jaxvaccine.data.prompts import Example, Prompt, PromptForm, as_prompt, format_prompt
from jaxvaccine.data.texts import check_prefill, check_prompts, check_training_texts, has_prompt, is_blank, without_eos
from jaxvaccine.data.tokenizer_files import eos_ids
from jaxvaccine.data.tokenizer_files import load_tokenizer as load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenizedExamples(NamedTuple):
    """Examples as token ids, unpadded.

    Attributes:
      input_ids: N int32 arrays [t]: prompt, answer, EOS (truncated ones end earlier).
      prompt_lengths: [N] int32; tokens from here on are supervised, unless `learnt` says which. Every example has at
        least one that a loss counts.
      fates: what became of every example that there was; N of them are "kept" or "cut".
      turns: [N] int; over a whole run, rows with a smaller number come before those with a larger one. None mixes all.
      learnt: N bool arrays [t] of conversations: which tokens are supervised.
      lengths: of every example that there was, in tokens before any are cut; 0 of an empty one.
    """

    input_ids: tuple[np.ndarray, ...]
    prompt_lengths: np.ndarray
    fates: tuple[Fate, ...] = ()
    turns: np.ndarray | None = None
    learnt: tuple[np.ndarray, ...] | None = None
    lengths: tuple[int, ...] = ()

    def take(self, rows: Sequence[int] | np.ndarray) -> "TokenizedExamples":
        """Some of them, in the given order, with the fates of all."""
        return self._replace(
            input_ids=tuple(self.input_ids[i] for i in rows), prompt_lengths=self.prompt_lengths[rows],
            turns=None if self.turns is None else self.turns[rows],
            learnt=None if self.learnt is None else tuple(self.learnt[i] for i in rows))

    @property
    def dropped(self) -> int:
        """How many examples were left out because their prompts alone fill max_length."""
        return self.fates.count("dropped")

    @property
    def cut(self) -> int:
        """How many answers lost their end, and EOS, to max_length."""
        return self.fates.count("cut")

    @property
    def empty(self) -> int:
        """How many examples were left out because they have no prompt or no answer."""
        return self.fates.count("empty")


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> None:
    """Raises ValueError if the tokenizer can produce an id that has no row in an embedding of [vocab_size, D]."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer: found token {token!r} with id {largest}, expected ids below {vocab_size} (the model's "
            "vocab_size): the tokenizer belongs to another model, or tokens were added to it"
        )


def _encode(tokenizer, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=special, **chat.IDS_ALONE)["input_ids"]


def _suffix(tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts after every text (an EOS, if it was saved with add_eos_token)."""
    with_special, plain = (_encode(tokenizer, ["a"], special)[0] for special in (True, False))
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[start + len(plain) :]
    return []


def _encode_open(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Encodes with the tokenizer's special tokens in front (BOS), and none behind, where more tokens will follow."""
    suffix = _suffix(tokenizer)
    encoded = _encode(tokenizer, texts)
    return [ids[: len(ids) - len(suffix)] if suffix and ids[-len(suffix) :] == suffix else ids for ids in encoded]


def _prompts(examples: Sequence[Example], prompt: Prompt) -> list[str]:
    return [format_prompt(e.instruction, e.input, prompt.form) for e in examples]


def tokenize_examples(
    tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], max_length: int,
    prompt: Prompt | PromptForm = "alpaca",
) -> TokenizedExamples:
    """Prompt, answer and exactly one EOS as ids, at most max_length tokens; only answer and EOS are supervised.

    Prompt and answer are encoded as one text, and the prompt's share is the length of the prompt encoded alone, as in
    the papers' trainers (Alpaca's `preprocess`). Where the text's encoding does not begin with the prompt's own tokens
    (a merge across the boundary), the answer is encoded alone and appended: training then continues exactly the tokens
    that generation starts from. An EOS that an answer spells out at its end is not taught twice.

    A chat is what `chat.encode_conversations` makes of it: the template writes what ends an answer. One whose
    end is beyond max_length is cut as an answer is; where no answer that is learnt begins within max_length, it
    is left out.

    Examples without a prompt or an answer, and those that truncation leaves without a supervised token, are left out;
    these and answers that are cut are counted, and reported as a warning.

    Raises:
      ValueError: no examples, max_length below 1, a tokenizer without EOS, no example is left, a text that holds the
        prompt's template or spells a special token (the row, its column and the token are named); of a chat as of
        `chat.encode_conversations`, and a conversation where the prompt is none.
    """
    if not examples:
        raise ValueError("examples: found none, expected at least one")
    if max_length < 1:
        raise ValueError(f"max_length: found {max_length}, expected at least 1")
    prompt = as_prompt(prompt)
    encoded, fates, lengths = _encode_examples(tokenizer, examples, max_length, prompt)
    learnt = tuple(of for _, of in encoded)
    tokenized = TokenizedExamples(
        tuple(ids for ids, _ in encoded), np.asarray([int(np.argmax(of)) for of in learnt], np.int32), fates,
        learnt=learnt if prompt.form == "chat" else None, lengths=lengths)
    if not encoded:
        _raise_for_none(tokenizer, examples, fates, max_length, prompt)
    lost = [f"{what.format(count)} of {len(examples)} {why}" for count, what, why in (
        (tokenized.dropped, "dropped {}", "examples: their prompts alone fill it, nothing is left to supervise"),
        (tokenized.empty, "left out {}", "examples: they have no prompt or no answer"),
        (tokenized.cut, "cut {}", "answers")) if count]
    if lost:
        logging.getLogger(__name__).warning("max_length=%d: %s", max_length, "; ".join(lost))
    if prompt.form == "chat":
        _warn_of_endless(tokenizer, tokenized)
    return tokenized


def _warn_of_endless(tokenizer, tokenized: TokenizedExamples) -> None:
    whole = [row for row, fate in enumerate(fate for fate in tokenized.fates if fate in ("kept", "cut"))
             if fate == "kept"]
    last = [tokenized.input_ids[row][np.flatnonzero(tokenized.learnt[row])[-1]] for row in whole]
    endless = np.flatnonzero(~np.isin(last, eos_ids(tokenizer)))
    if endless.size:
        logging.getLogger(__name__).warning(
            "prompt=chat: %d of %d answers end, as the chat template has them or marks them, with %r, which does not "
            "end an answer (%s do): the model does not learn to stop there", endless.size, len(whole),
            tokenizer.decode([int(last[endless[0]])]), ", ".join(
                repr(tokenizer.convert_ids_to_tokens(i)) for i in eos_ids(tokenizer)))


def training_fates(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], max_length: int,
                   prompt: Prompt | PromptForm = "alpaca") -> tuple[Fate, ...]:
    """What tokenize_examples would make of every example; raises as it does, but where none is left."""
    return measure(tokenizer, examples, max_length, prompt)[0]


def measure(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], max_length: int,
            prompt: Prompt | PromptForm = "alpaca") -> tuple[tuple[Fate, ...], tuple[int, ...]]:
    """(`training_fates`, `TokenizedExamples.lengths`) of examples; raises as `training_fates`."""
    return _encode_examples(tokenizer, examples, max_length, as_prompt(prompt))[1:] if examples else ((), ())


def _encode_examples(tokenizer, examples: Sequence[Example], max_length: int, prompt: Prompt
                     ) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[Fate, ...], tuple[int, ...]]:
    """([(token ids, [t] bool which are learnt)] of what is trained on, the fate of every example, its tokens)."""
    eos = _eos(tokenizer)
    check_training_texts(tokenizer, examples, prompt)
    answers = [without_eos(e.output, tokenizer.eos_token) for e in examples]
    empty = [is_blank(answer) or not has_prompt(e) for e, answer in zip(examples, answers, strict=True)]
    rows = [e if answer == e.output else e._replace(output=answer)
            for e, answer in zip(examples, answers, strict=True)]
    filled = [row for row, nothing in zip(rows, empty, strict=True) if not nothing]
    if prompt.form == "chat":
        numbers = [i for i, nothing in enumerate(empty) if not nothing]
        whole = iter(chat.encode_conversations(tokenizer, filled, prompt, numbers) if filled else ())
    else:
        whole = (([*ids, eos], np.arange(len(ids) + 1) >= len(prompt_ids))
                 for prompt_ids, ids in (_encode_pairs(tokenizer, filled, prompt) if filled else ()))
    encoded: list[tuple[np.ndarray, np.ndarray]] = []
    fates: list[Fate] = []
    lengths: list[int] = []
    for nothing in empty:
        if nothing:
            fates.append("empty")
            lengths.append(0)
            continue
        ids, learnt = next(whole)
        lengths.append(len(ids))
        # Position i predicts label i + 1, so the first token of a row is never a target.
        if not learnt[1:max_length].any():
            fates.append("dropped")
            continue
        encoded.append((np.asarray(ids[:max_length], np.int32), learnt[:max_length]))
        fates.append("kept" if not learnt[max_length:].any() else "cut")
    return encoded, tuple(fates), tuple(lengths)


def _encode_pairs(tokenizer, examples: Sequence[Example], prompt: Prompt) -> list[tuple[list[int], list[int]]]:
    """(ids of the prompt, ids of prompt and answer) of every example; the latter begin with the former."""
    prompts = _prompts(examples, prompt)
    prompt_ids = _encode_open(tokenizer, prompts)
    joint_ids = _encode_open(tokenizer, [p + e.output for p, e in zip(prompts, examples, strict=True)])
    merged = [i for i, (p, j) in enumerate(zip(prompt_ids, joint_ids, strict=True)) if j[: len(p)] != p]
    if merged:
        answers = _encode(tokenizer, [examples[i].output for i in merged], special=False)
        for i, answer in zip(merged, answers, strict=True):
            joint_ids[i] = prompt_ids[i] + answer
    return list(zip(prompt_ids, joint_ids, strict=True))


def _raise_for_none(tokenizer, examples: Sequence[Example], fates: Sequence[Fate], max_length: int,
                    prompt: Prompt) -> None:
    if "dropped" not in fates:
        raise ValueError(f"examples: found {len(examples)} without a prompt or without an answer, the first is "
                         f"{place(examples[0], 0)}, expected at least one with both")
    dropped = [e for e, fate in zip(examples, fates, strict=True) if fate == "dropped"]
    shortest = min(len(ids) for ids in _encode_prompts(tokenizer, dropped, prompt))
    raise ValueError(
        f"max_length: found {max_length}, expected more than {shortest}, the length in tokens of the shortest "
        f"prompt: truncation left none of {len(examples)} examples a supervised token"
    )


def encode_prompts(
    tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], max_length: int | None = None,
    prompt: Prompt | PromptForm = "alpaca", prefill: str = "",
) -> list[np.ndarray]:
    """The prompts alone, int32 [t] each: the same tokens that tokenize_examples puts before the answer.

    prefill: what the answer begins with already; its tokens, those of a trained answer that begins so, follow the
      prompt's.

    Raises:
      ValueError: a prompt longer than max_length tokens (None: no limit); a cut prompt would be another question. And
        as of `texts.check_prompts`.
    """
    prompt = as_prompt(prompt)
    check_prompts(tokenizer, examples, prompt)
    if prefill:
        check_prefill(tokenizer, prefill, prompt)
    prompt_ids = _encode_prompts(tokenizer, examples, prompt, prefill) if examples else []
    if max_length is not None:
        too_long = [(i, len(ids)) for i, ids in enumerate(prompt_ids) if len(ids) > max_length]
        if too_long:
            row, length = too_long[0]
            raise ValueError(
                f"prompt of row {row} (from 0): found {length} tokens, expected at most max_length={max_length} "
                f"({len(too_long)} of {len(prompt_ids)} prompts are longer)"
            )
    return [np.asarray(ids, np.int32) for ids in prompt_ids]


def _encode_prompts(tokenizer, examples: Sequence[Example], prompt: Prompt, prefill: str = "") -> list[list[int]]:
    if prompt.form == "chat":
        return chat.encode_questions(tokenizer, examples, prompt, prefill)
    if prefill:
        begun = [e._replace(output=prefill) for e in examples]
        return [ids for _, ids in _encode_pairs(tokenizer, begun, prompt)]
    return _encode_open(tokenizer, _prompts(examples, prompt))


def _eos(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: found no eos_token, expected one (answers end with it)")
    return tokenizer.eos_token_id
