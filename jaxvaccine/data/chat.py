"""Conversations under the chat template of a model's tokenizer, rendered and tokenised by transformers.

The template writes BOS and whatever else there is: no special token is added to its text. Ids are those of
`apply_chat_template(tokenize=True)`.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxvaccine.data.accounts import place
from jaxvaccine.data.prompts import Example, Prompt, Turn, turns_of
from jaxvaccine.data.tokenizer_files import eos_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What a tokenizer is asked for: ids alone, and all of them. verbose=False: our own max_length decides what is too long,
# not the tokenizer's model_max_length.
IDS_ALONE = {"padding": False, "truncation": False, "return_attention_mask": False, "return_token_type_ids": False,
             "verbose": False}
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Llama 3.1's template writes the day's date, and this one where it has no clock: a run is to be the same tomorrow.
_DATE = {"date_string": "26 Jul 2024"}
_CLOCK = "strftime_now"


class Encoded(NamedTuple):
    """A conversation as tokens.

    Attributes:
      ids: of the whole, [t].
      learnt: [t] bool, which of them are supervised.
    """

    ids: list[int]
    learnt: np.ndarray


def has_template(tokenizer: "PreTrainedTokenizerFast") -> bool:
    return bool(tokenizer.chat_template)


def chat_template(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The tokenizer's template; of several, the one without tools.

    Raises:
      ValueError: it has none.
    """
    if not has_template(tokenizer):
        raise ValueError("prompt: found chat, expected alpaca or plain: the tokenizer has no chat template "
                         "(chat_template.jinja, or chat_template of tokenizer_config.json)")
    return tokenizer.get_chat_template()


def template_hash(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of the template, 64 hex digits; errors as of `chat_template`."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()


def depends_on_the_day(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether the template writes a date that nobody can set."""
    return _CLOCK in chat_template(tokenizer) and not date_options(tokenizer)


def encode_conversations(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], prompt: Prompt,
                         numbers: Sequence[int]) -> list[Encoded]:
    """Whole conversations, with their answers, and which tokens of them are supervised.

    With `prompt.supervise` "all" these are the tokens of every answer, with "last" of the last one. Where the template
    marks answers by {% generation %}, they are what `apply_chat_template(return_assistant_tokens_mask=True)` says.
    Elsewhere an answer begins where what the model is asked with ends, the text with the generation prompt, and ends
    with the first token that ends an answer (`tokenizer_files.eos_ids`), or with its turn if there is none. A token
    across the beginning is supervised.

    Args:
      tokenizer: the model's.
      examples: all with a question and an answer.
      prompt: of the form chat.
      numbers: of the examples, for messages.

    Raises:
      ValueError: no template; it refuses a conversation; or what it writes before an answer is not what the model is
        asked with, such as where it changes earlier turns.
    """
    template = chat_template(tokenizer)
    if not examples:
        return []
    places = [place(e, i) for e, i in zip(examples, numbers, strict=True)]
    every = [turns_of(example, prompt.system) for example in examples]
    texts = _render(tokenizer, every, places)
    answers = [(row, k) for row, turns in enumerate(every) for k in _learnt_turns(turns, prompt)]
    of = [places[row] for row, _ in answers]
    asked = _render(tokenizer, [every[row][:k] for row, k in answers], of, ask=True)
    whole = [k + 1 == len(every[row]) for row, k in answers]
    through = iter(_render(tokenizer, [every[row][:k + 1] for (row, k), last in zip(answers, whole, strict=True)
                                       if not last], [p for p, last in zip(of, whole, strict=True) if not last]))
    spans: list[list[tuple[int, int]]] = [[] for _ in examples]
    for (row, k), before, last in zip(answers, asked, whole, strict=True):
        end = texts[row] if last else next(through)
        _check_prefixes(places[row], k, texts[row], before, end, last)
        spans[row].append((len(before), len(end)))
    if _MARKS_ANSWERS.search(template):
        return _as_marked(tokenizer, every, spans, prompt)
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, **IDS_ALONE)
    ends = np.asarray(eos_ids(tokenizer))
    return [Encoded(ids, _within(np.asarray(ids), np.asarray(offsets), of, ends)) for ids, offsets, of
            in zip(out["input_ids"], out["offset_mapping"], spans, strict=True)]


def encode_questions(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example], prompt: Prompt,
                     prefill: str = "") -> list[list[int]]:
    """Conversations up to their last question, with the generation prompt behind it, and what the answer begins with.

    Raises:
      ValueError: as of `encode_conversations`.
    """
    places = [place(e, i) for i, e in enumerate(examples)]
    turns = [turns_of(example, prompt.system, answered=False) for example in examples]
    texts = _render(tokenizer, turns, places, ask=True)
    ids = encode_rendered(tokenizer, texts)
    if not prefill:
        return ids
    begun = _render(tokenizer, [(*of, Turn("assistant", prefill)) for of in turns], places, continued=True)
    for where, text, longer, of in zip(places, texts, begun, turns, strict=True):
        _check_prefixes(where, len(of), longer, text, longer, True)
    joint = encode_rendered(tokenizer, begun)
    rest = iter(encode_rendered(tokenizer, [longer[len(text):] for text, longer in zip(texts, begun, strict=True)]))
    return [both if both[:len(of)] == of else of + alone for of, both, alone in zip(ids, joint, rest, strict=True)]


def encode_rendered(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of what a chat template wrote: nothing is added to it."""
    return tokenizer(list(texts), add_special_tokens=False, **IDS_ALONE)["input_ids"] if texts else []


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def date_options(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """What a template that asks for the day is told, so that it says the same on every day; {} of others."""
    template = chat_template(tokenizer)
    return _DATE if _CLOCK in template and all(name in template for name in _DATE) else {}


def _render(tokenizer, conversations: Sequence[Sequence[Turn]], places: Sequence[str], ask: bool = False,
            continued: bool = False) -> list[str]:
    """The text of each; ask: with the generation prompt; continued: of the last turn, only its text and no end."""
    if not conversations:
        return []
    import jinja2

    def call(of: Sequence[Sequence[Turn]]) -> list[str]:
        return tokenizer.apply_chat_template([_messages(turns) for turns in of], tokenize=False,
                                             add_generation_prompt=ask, continue_final_message=continued,
                                             **date_options(tokenizer))

    refusals = jinja2.TemplateError, TypeError, ValueError, KeyError
    try:
        return call(conversations)
    except refusals:
        for turns, where in zip(conversations, places, strict=True):
            try:
                call([turns])
            except refusals as error:
                roles = ", ".join(turn.role for turn in turns)
                raise ValueError(f"{where}: found turns {roles}, expected some that the tokenizer's chat template "
                                 f"takes; it says: {error}") from error
        raise


def _learnt_turns(turns: Sequence[Turn], prompt: Prompt) -> list[int]:
    answers = [k for k, turn in enumerate(turns) if turn.role == "assistant"]
    return answers if prompt.supervise == "all" else answers[-1:]


def _check_prefixes(where: str, k: int, text: str, asked: str, end: str, last: bool) -> None:
    """Raises ValueError unless text begins with what comes before turn k, and that with it."""
    if text.startswith(asked) and end.startswith(asked) and text.startswith(end):
        return
    if last:
        raise ValueError(f"{where}: turn {k} (from 0): found a chat template that writes the turns before the last "
                         "answer otherwise than it asks for it, expected one whose generation prompt is what answers "
                         "begin with: what was learnt would not be what the model is asked with")
    raise ValueError(f"{where}: turn {k} (from 0): found a chat template that writes earlier turns otherwise when "
                     "others follow (as one does that leaves out earlier thinking), expected one that does not, or "
                     "supervise=last, which learns the last answer alone")


def _as_marked(tokenizer, every: Sequence[Sequence[Turn]], spans: Sequence[Sequence[tuple[int, int]]], prompt: Prompt
               ) -> list[Encoded]:
    """What a template with {% generation %} marks; of "last", behind the beginning of the last answer."""
    out = tokenizer.apply_chat_template([_messages(turns) for turns in every], return_dict=True,
                                        return_assistant_tokens_mask=True,
                                        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
                                        **date_options(tokenizer))
    found = []
    for ids, mask, offsets, of in zip(out["input_ids"], out["assistant_masks"], out["offset_mapping"], spans,
                                      strict=True):
        learnt = np.asarray(mask, bool)
        if prompt.supervise == "last":
            learnt &= np.asarray(offsets)[:, 1] > of[-1][0]
        found.append(Encoded(ids, learnt))
    return found


def _within(ids: np.ndarray, offsets: np.ndarray, spans: Sequence[tuple[int, int]], ends: np.ndarray) -> np.ndarray:
    """[t] bool: of every span of characters its tokens, to the first one that ends an answer."""
    learnt = np.zeros(len(ids), bool)
    for start, stop in spans:
        within = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
        ending = np.flatnonzero(np.isin(ids[within], ends))
        learnt[within[:ending[0] + 1] if ending.size else within] = True
    return learnt
