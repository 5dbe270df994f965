"""What is put around an example: the papers' prompt, which is Stanford Alpaca's with a line break more, nothing, or the
chat template of the model's tokenizer."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

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
PromptForm = Literal["alpaca", "plain", "chat"]
Supervise = Literal["all", "last"]
Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
# By form: with an input, and without one.
TEMPLATES: dict[PromptForm, tuple[str, str]] = {
    "alpaca": (PROMPT_INPUT, PROMPT_NO_INPUT), "plain": ("{instruction}\n{input}\n", "{instruction}\n")}


class Prompt(NamedTuple):
    """What is put around examples, and which answers are learnt.

    Attributes:
      form: alpaca, the papers' template; plain, line breaks; chat, the tokenizer's own template (`chat`).
      system: of chat, the system prompt of conversations that have none; "" leaves it to the template.
      supervise: of conversations with several answers, all are learnt or the last one.
    """

    form: PromptForm = "alpaca"
    system: str = ""
    supervise: Supervise = "all"


def as_prompt(prompt: Prompt | PromptForm) -> Prompt:
    """A form alone is a prompt with nothing else."""
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Role
    text: str


class Example(NamedTuple):
    """One prompt and the answer that is to be learnt, as text; `input` may be empty, and so may `output`.

    `history`, of a `Conversation`, is what was said before; two examples are equal if that is too.
    """

    instruction: str
    input: str = ""
    output: str = ""

    @property
    def history(self) -> tuple[Turn, ...]:
        return ()

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) is True and self.history == getattr(other, "history", ())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.history)) if self.history else tuple.__hash__(self)


class Conversation(Example):
    """An example whose prompt is a conversation: `history`, then the user's question (instruction, no input), which
    `output` answers."""

    turns: tuple[Turn, ...] = ()

    @property
    def history(self) -> tuple[Turn, ...]:
        """A system prompt and the turns before the question, in order."""
        return self.turns

    def _replace(self, **given: Any) -> Self:
        return with_history(Example(*super()._replace(**given)), self.turns)


def with_history(example: Example, history: Sequence[Turn]) -> Example:
    """The example's texts behind these turns; without any, a plain Example."""
    if not history:
        return Example(*example)
    conversation = Conversation(*example)
    conversation.turns = tuple(history)
    return conversation


def conversation(turns: Sequence[Turn]) -> Example:
    """The example that these turns are: the last user's turn is its question, what answers it its output, which is ""
    where nothing does.

    Raises:
      ValueError: the turns do not end in a user's turn, or in an assistant's behind one; the assistant begins; or a
        role is unknown.
    """
    for k, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise ValueError(f"turn {k} (from 0): found role {turn.role!r}, expected one of {', '.join(ROLES)}")
    if turns and turns[0].role == "assistant":
        raise ValueError("turn 0 (from 0): found role 'assistant', expected system or user: an answer has a question")
    answered = bool(turns) and turns[-1].role == "assistant"
    *history, question = turns[:len(turns) - answered] or [Turn("system", "")]
    if question.role != "user":
        found = ", ".join(turn.role for turn in turns) or "none"
        raise ValueError(f"found turns {found}, expected them to end with the user's, or with the assistant's answer "
                         "to it")
    return with_history(Example(question.text, "", turns[-1].text if answered else ""), history)


def turns_of(example: Example, system: str = "", answered: bool = True) -> tuple[Turn, ...]:
    """All turns of an example, its answer included unless it is empty or not `answered`; what `conversation` takes.

    system: a system prompt that comes first, unless the history has one.
    """
    own = any(turn.role == "system" for turn in example.history)
    first = (Turn("system", system),) if system and not own else ()
    last = (Turn("assistant", example.output),) if answered and example.output else ()
    return (*first, *example.history, Turn("user", question_text(example)), *last)


def question_text(example: Example) -> str:
    """Instruction and, on the next line, input."""
    return f"{example.instruction}\n{example.input}" if example.input else example.instruction


def classification(instruction: str, text: str, label: str) -> Example:
    """A text to be labelled. Without a text there is no prompt: the instruction alone asks nothing."""
    text = text.strip()
    return Example(instruction if text else "", text, label)


def format_prompt(instruction: str, input: str = "", prompt: PromptForm = "alpaca") -> str:
    """The text that a model is given, which ends in a line break; the answer follows directly.

    An empty `input` selects the template without one. "plain" has no template: the instruction, the input if there is
    one, and a line break behind each. "chat" is no text of ours: `chat` has the tokenizer's.
    """
    with_input, without = TEMPLATES[prompt]
    return with_input.format(instruction=instruction, input=input) if input else without.format(instruction=instruction)
