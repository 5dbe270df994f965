"""What is put around an example: the papers' prompt, which is Stanford Alpaca's with a line break more, or nothing."""

from typing import Literal, NamedTuple

# PROMPT_DICT of github.com/tatsu-lab/stanford_alpaca, train.py, and a line break behind "### Response:", with which the
# programs of both papers train and evaluate.
PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PromptForm = Literal["alpaca", "plain"]
# By form: with an input, and without one.
TEMPLATES: dict[PromptForm, tuple[str, str]] = {
    "alpaca": (PROMPT_INPUT, PROMPT_NO_INPUT), "plain": ("{instruction}\n{input}\n", "{instruction}\n")}


class Example(NamedTuple):
    """One prompt and the answer that is to be learnt, as text; `input` may be empty, and so may `output`."""

    instruction: str
    input: str = ""
    output: str = ""


def classification(instruction: str, text: str, label: str) -> Example:
    """A text to be labelled. Without a text there is no prompt: the instruction alone asks nothing."""
    text = text.strip()
    return Example(instruction if text else "", text, label)


def format_prompt(instruction: str, input: str = "", prompt: PromptForm = "alpaca") -> str:
    """The text that a model is given, which ends in a line break; the answer follows directly.

    An empty `input` selects the template without one. "plain" has no template: the instruction, the input if there is
    one, and a line break behind each.
    """
    with_input, without = TEMPLATES[prompt]
    return with_input.format(instruction=instruction, input=input) if input else without.format(instruction=instruction)
