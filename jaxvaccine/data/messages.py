"""Conversations as files have them: OpenAI's messages, {"role", "content"}, and ShareGPT's, {"from", "value"}."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxvaccine.data.prompts import Example, Turn, conversation
from jaxvaccine.data.rows import RowError, column, valid_unicode, where

COLUMNS = ("messages", "conversations", "conversation")
_TOOL, _CALL = "tool", "call"
# By how files call them.
ROLES = MappingProxyType({
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": _TOOL, "function": _TOOL, "observation": _TOOL, "function_response": _TOOL, "function_call": _CALL,
    "tool_call": _CALL})
# Fields that are no part of what is said.
_ASIDE = frozenset(("name", "id", "tool_call_id", "timestamp", "message_id", "index", "idx"))


def messages(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """One conversation a row, of the first column there is of COLUMNS. The last assistant's turn, if it ends the
    conversation, is the answer; what ends with the user is a prompt without one.

    An assistant's calls of tools are text behind what it says, <tool_call>{"name", "arguments"}</tool_call>, and what
    tools return is a user's turn, <tool_response>…</tool_response>: Hermes' form, which Qwen's template writes too.

    Raises:
      ValueError: no such column; it is no list of messages with a role of ROLES and a text, or they hold anything
        else; a conversation that does not end with the user, or the assistant's answer.
    """
    return [conversation_of(row, i) for i, row in enumerate(rows)]


def conversation_of(row: Mapping[str, Any], index: int) -> Example:
    """A row's conversation; errors as of `messages`."""
    name = column(row, index, COLUMNS)
    return said(turns(row[name], f"{where(row, index)}: column {name!r}"), f"{where(row, index)}: column {name!r}")


def said(of: Sequence[Turn], place: str) -> Example:
    """The example that turns are; RowError that names the place if they are none."""
    try:
        return conversation(of)
    except ValueError as error:
        raise RowError(f"{place}: {error}", "no conversation") from error


def turns(value: Any, place: str) -> list[Turn]:
    """The turns of a list of messages, or of its JSON, as a table has it; empty system prompts are left out.

    Raises:
      RowError: as of `messages`, with the place in front.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise RowError(f"{place}: found malformed JSON ({e}), expected a list of messages", "malformed messages"
                           ) from e
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        raise RowError(f"{place}: found {value!r:.80}, expected a list of messages, at least one", "malformed messages")
    found: list[Turn] = []
    tools = False  # whether the last turn is what tools returned
    for k, message in enumerate(value):
        role, text = _message(message, f"{place}: message {k} (from 0)")
        if role == _TOOL and tools:
            found[-1] = Turn("user", f"{found[-1].text}\n{text}")
        elif role != "system" or text.strip():
            found.append(Turn("user" if role == _TOOL else role, text))
        tools = role == _TOOL
    return found


def _message(message: Any, place: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise RowError(f"{place}: found {message!r:.80}, expected an object with role and content",
                       "malformed messages")
    names = ("from", "value") if "role" not in message and "from" in message else ("role", "content")
    said = message.get(names[0])
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise RowError(f"{place}: field {names[0]!r}: found {said!r:.80}, expected one of {', '.join(ROLES)}",
                       "another role")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RowError(f"{place}: field 'tool_calls': found {calls!r:.80}, expected a list of calls",
                       "malformed tool calls")
    calls = [*calls, *([message["function_call"]] if message.get("function_call") else [])]
    others = [name for name, value in message.items()
              if name not in {*names, *_ASIDE, "tool_calls", "function_call"} and value not in (None, "", [], {})
              and (name, value) != ("weight", 1)]
    if others:
        raise RowError(f"{place}: found field {others[0]!r}, expected {names[0]} and {names[1]} alone",
                       f"messages with a field {others[0]!r}")
    if calls and role != "assistant":
        raise RowError(f"{place}: found calls of tools by {said!r}, expected them of the assistant",
                       "malformed messages")
    text = _content(message.get(names[1]), f"{place}: field {names[1]!r}", bool(calls))
    if role == _TOOL:
        return role, f"<tool_response>\n{text}\n</tool_response>"
    if role == _CALL:
        return "assistant", f"<tool_call>\n{text}\n</tool_call>"
    return role, "\n".join([*([text] if text or not calls else []), *(
        _call(call, f"{place}: tool call {n} (from 0)") for n, call in enumerate(calls))])


def _content(value: Any, place: str, may_lack: bool) -> str:
    if value is None and may_lack:
        return ""
    if isinstance(value, list) and value and all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise RowError(f"{place}: found {value!r:.80}, expected text", "messages without text")
    return valid_unicode(value, place)


def _call(call: Any, place: str) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, Mapping) else (
        None, None)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as e:
            raise RowError(f"{place}: field 'arguments': found malformed JSON ({e}), expected an object",
                           "malformed tool calls") from e
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise RowError(f"{place}: found {call!r:.80}, expected a function with name and arguments",
                       "malformed tool calls")
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{valid_unicode(text, place)}\n</tool_call>"
