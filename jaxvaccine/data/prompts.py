"""The papers' prompt: Stanford Alpaca's template, letter for letter."""

from typing import NamedTuple

# PROMPT_DICT of github.com/tatsu-lab/stanford_alpaca, train.py. Booster and T-Vaccine train and evaluate with it;
# Booster's program has a line break more at its end.
PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Example(NamedTuple):
    """One prompt and the answer that is to be learnt, as text; `input` may be empty, and so may `output`."""

    instruction: str
    input: str = ""
    output: str = ""


def classification(instruction: str, text: str, label: str) -> Example:
    """A text to be labelled. Without a text there is no prompt: the instruction alone asks nothing."""
    text = text.strip()
    return Example(instruction if text else "", text, label)


def format_prompt(instruction: str, input: str = "") -> str:
    """The text that a model is given; the answer follows directly after "### Response:", as in Alpaca's trainer.

    An empty `input` selects the template without one.
    """
    if input:
        return PROMPT_INPUT.format(instruction=instruction, input=input)
    return PROMPT_NO_INPUT.format(instruction=instruction)
