"""Conversations as OpenAI's chat API and transformers' templates have them: a list of {"role", "content"}."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxvaccine.data.prompts import ROLES, Example, Turn, conversation
from jaxvaccine.data.rows import column, text, where

COLUMN = "messages"


def messages(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """One conversation a row. The last assistant's turn, if it ends the conversation, is the answer; what ends with the
    user is a prompt without one.

    Raises:
      ValueError: no column "messages"; it is no list of objects with the role system, user or assistant and the text
        content, or they hold anything else; a conversation that does not end with the user, or the assistant's answer.
    """
    return [_conversation(row, i) for i, row in enumerate(rows)]


def _conversation(row: Mapping[str, Any], index: int) -> Example:
    place, found = f"{where(row, index)}: column {COLUMN!r}", row[column(row, index, [COLUMN])]
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise ValueError(f"{place}: found {found!r:.80}, expected a list of messages, at least one")
    try:
        return conversation([_turn(message, f"{place}: message {k} (from 0)") for k, message in enumerate(found)])
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(place) else f"{place}: {message}") from error


def _turn(message: Any, place: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place}: found {message!r:.80}, expected an object with role and content")
    other = [name for name, value in message.items() if name not in ("role", "content") and value is not None]
    if other:
        raise ValueError(f"{place}: found field {other[0]!r}, expected role and content alone")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{place}: field 'role': found {role!r:.80}, expected one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"{place}: field 'content': found {message.get('content')!r:.80}, expected text")
    try:
        return Turn(role, text(message, 0, "content"))
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).partition(': ')[2]}") from error
