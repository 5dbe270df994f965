"""What a language model is asked about an answer: by its own chat template, or by a template in a file.

No vendor's prompt is written down here: Llama Guard's and ShieldGemma's come with their tokenizers, others' are
published with their models.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxvaccine.data import chat
from jaxvaccine.json_files import decode_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT = "chat"
# What the places of the request and of the answer are called in published templates.
PROMPTS, ANSWERS = ("prompt", "behavior", "instruction", "request"), ("answer", "response", "generation")
_PLACE = re.compile(rf"\{{({'|'.join((*PROMPTS, *ANSWERS))})\}}")

Render = Callable[[str, str], str]


def read_template(path: str) -> str:
    """The text of a template's file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no UTF-8, or has not both places, one of PROMPTS and one of ANSWERS in braces.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected a template with {{prompt}} and {{answer}}, or "
                                f"{CHAT}")
    text = decode_utf8(Path(path).read_bytes(), Path(path))
    places = {"prompt" if name in PROMPTS else "answer" for name in _PLACE.findall(text)}
    if len(places) < 2:
        raise ValueError(f"{path}: found {'no {prompt}' if 'prompt' not in places else 'no {answer}'}, expected a "
                         f"template with both; {{{'}, {'.join(PROMPTS[1:])}}} and {{{'}, {'.join(ANSWERS[1:])}}} are "
                         "the same")
    return text


def fill(template: str, prompt: str, answer: str) -> str:
    """A template with both in their places; what they say of places themselves is text."""
    return _PLACE.sub(lambda found: prompt if found[1] in PROMPTS else answer, template)


def chat_render(tokenizer: "PreTrainedTokenizerFast", variables: Mapping[str, Any]) -> Render:
    """Asks by the tokenizer's own chat template, of a conversation of a user and an assistant. A template that asks for
    the date gets that of `chat`: who judges is to be the same tomorrow.

    variables: what else the template reads, such as ShieldGemma's `guideline`.

    Raises:
      ValueError: the tokenizer has no chat template, or it does not show the prompt and the answer whole.
    """
    if not chat.has_template(tokenizer):
        raise ValueError(f"{tokenizer.name_or_path}: found no chat template, expected one, or a template's file")

    def render(prompt: str, answer: str, parts: bool) -> str:
        def content(text: str) -> Any:
            return [{"type": "text", "text": text}] if parts else text

        turns = [{"role": "user", "content": content(prompt)}, {"role": "assistant", "content": content(answer)}]
        # No generation prompt: as the cards of Llama Guard and ShieldGemma call it.
        return tokenizer.apply_chat_template(turns, tokenize=False, **{**chat.date_options(tokenizer), **variables})

    said = []
    for parts in (False, True):  # some templates read a message in parts alone
        try:
            shown = render("PROMPTPLACE", "ANSWERPLACE", parts)
        except Exception as error:  # whatever a template raises
            said.append(f"{type(error).__name__}: {error}")
            continue
        if "PROMPTPLACE" in shown and "ANSWERPLACE" in shown and all(
                str(value) in shown for value in variables.values()):
            return lambda prompt, answer: render(prompt, answer, parts)
        said.append("it leaves out the prompt, the answer or the guideline")
    raise ValueError(f"{tokenizer.name_or_path}: chat template: found one that does not show a prompt and its answer "
                     f"({said[0]}), expected a judge's, or a template's file")


def encode(tokenizer: "PreTrainedTokenizerFast", texts: list[str], template: str = CHAT) -> list[np.ndarray]:
    """Token ids, int32 [T], of rendered texts. To what a chat template wrote nothing is added, as transformers adds
    nothing; around other texts BOS and the like are put, unless they begin with BOS."""
    if template == CHAT:
        return [np.asarray(ids, np.int32) for ids in chat.encode_rendered(tokenizer, texts)]
    bos, rows = tokenizer.bos_token, []
    for text in texts:
        special = not (bos and text.startswith(bos))
        row = tokenizer(text, add_special_tokens=special, padding=False, truncation=False, return_attention_mask=False,
                        return_token_type_ids=False)["input_ids"]
        # A tokenizer that closes every text would end the reply before it began.
        closed = row and row[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0")
        rows.append(np.asarray(row[:-1] if closed else row, np.int32))
    return rows
