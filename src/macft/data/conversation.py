"""The one form of a conversation, into which every row's messages and tools are brought.

Data sets write the same conversation in many ways: text as a list of parts, arguments of a tool call as a string of
JSON, ShareGPT's names of roles, nulls that Arrow puts where another row has a value. A chat template is written for one
of them and prints the others as they are, in silence. Training, validation, evaluation and generation all use this
form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from macft.errors import DataError

Message = Mapping[str, Any]
"""``role``, ``content`` (a string; a message with ``tool_calls`` may have none), and what else the template reads."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
}
"""Other names of roles, and the usual ones that chat templates know."""
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of ShareGPT whose content is a tool call as JSON."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the one form, and descriptions of tools for the chat template; no tools are None.

    ``renamed_roles`` holds the roles that the row writes otherwise than :data:`ROLES`, for a note.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    renamed_roles: frozenset[str] = frozenset()

    def until_answer(self) -> Conversation:
        """The conversation up to its answer, the last message of the assistant; later messages are left out.

        Raises:
            DataError: The assistant says nothing, or nothing comes before its answer.
        """
        answers = [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not answers:
            roles = ", ".join(dict.fromkeys(str(message["role"]) for message in self.messages))
            raise DataError(f"no message is the assistant's, so it has no answer; the roles are {roles}")
        if answers[-1] == 0:
            raise DataError("the answer is its first message, so it has no prompt")
        return Conversation(self.messages[: answers[-1] + 1], self.tools)

    def prompt(self) -> Conversation:
        """All messages before the last one."""
        return Conversation(self.messages[:-1], self.tools)


def conversation(messages: Any, tools: Any, field: str) -> Conversation:
    """The one form of the messages and tools of a row.

    - ``messages`` and ``tools`` may be strings of JSON; an empty list of tools is None.
    - A message has ``role`` and ``content``, or ShareGPT's ``from`` and ``value``; roles of :data:`ROLES` get their
      usual name. The role ``function_call``, and a field of that name, become ``tool_calls`` of the assistant.
    - Content given as parts becomes their text, joined as ``mlx_lm.server`` does. Missing content is empty; beside
      ``tool_calls`` it stays missing, as chat templates expect it.
    - The arguments of a tool call given as a string of JSON become an object.
    - Keys whose value is null are dropped, at any depth: Arrow gives each object all keys of the column. A null inside
      a string of JSON was written on purpose, and stays.

    The form of messages that are in the form already is the same.

    Args:
        field: The row's field that has the messages, in backticks, for errors.

    Raises:
        DataError: Something can't be brought into the form; the message names the field and the message's number.
    """
    decoded = _decoded(messages)
    if not isinstance(decoded, list) or not decoded or not all(isinstance(item, Mapping) for item in decoded):
        raise DataError(f'{field} must be a list of objects such as {{"role": "user", "content": "..."}}')
    formed, renamed = [], set()
    for number, item in enumerate(decoded, 1):
        try:
            message, written = _message(drop_nulls(item))
        except DataError as error:
            raise DataError(f"{field}, message {number}: {' '.join(str(error).split())}") from error
        formed.append(message)
        if written != message["role"]:
            renamed.add(written)
    return Conversation(formed, _tools(tools), frozenset(renamed))


def drop_nulls(value: Any) -> Any:
    """``value`` without the keys whose value is None, in objects at any depth; items of lists stay."""
    if isinstance(value, Mapping):
        return {name: drop_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [drop_nulls(item) for item in value]
    return value


def _message(written: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The message's form, and its role as written."""
    rest = dict(written)
    if "role" not in rest and "from" in rest:
        role, content = rest.pop("from"), rest.pop("value", None)
        content = rest.pop("content", None) if content is None else content
    elif "role" in rest:
        role, content = rest.pop("role"), rest.pop("content", None)
    else:
        raise DataError("it has no `role`")
    if not isinstance(role, str):
        raise DataError(f"`role` must be a string, not {type(role).__name__}")
    text = _text(content)
    if role in _CALL_ROLES:
        return {"role": "assistant", "tool_calls": _called(text), **rest}, role
    message: dict[str, Any] = {"role": ROLES.get(role, role)}
    calls = _tool_calls(rest.pop("tool_calls", None))
    if "function_call" in rest:  # OpenAI's older way
        calls += _tool_calls([{"type": "function", "function": rest.pop("function_call")}])
    if text is not None or not calls:
        message["content"] = text or ""
    if calls:
        message["tool_calls"] = calls
    return message | rest, role


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"`content` must be a string or a list of text parts, not {type(content).__name__}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise DataError(f"a part of `content` has the type {kind}; only parts of the type text can be trained on")
        if not isinstance(part.get("text"), str):
            raise DataError("a part of `content` has no `text`, or one that is not a string")
    return "".join(part["text"] for part in content)


def _called(text: str | None) -> list[dict[str, Any]]:
    """The tool calls that the content of a ``function_call`` message describes."""
    try:
        found = json.loads(text or "")
    except ValueError as error:
        raise DataError(f"the content of a function call must be JSON with `name` and `arguments` ({error})") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise DataError("the content of a function call must be an object with `name` and `arguments`")
    return _tool_calls([{"type": "function", "function": call} for call in calls])


def _tool_calls(written: Any) -> list[dict[str, Any]]:
    calls = _decoded(written) or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError("`tool_calls` must be a list of objects")
    formed = []
    for call in calls:
        function = call.get("function")
        # Some data sets leave out the level `function`; templates that take both tell them apart by it.
        formed.append(_with_arguments(call) if function is None else {**call, "function": _with_arguments(function)})
    return formed


def _with_arguments(function: Any) -> dict[str, Any]:
    if not isinstance(function, Mapping):
        raise DataError(f"the `function` of a tool call must be an object, not {type(function).__name__}")
    arguments = function.get("arguments")
    name = function.get("name", "a tool")
    if arguments is None or arguments == "":
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the arguments of the call of {name} are a string that is not JSON ({error})") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of the call of {name} must be an object, not {type(arguments).__name__}")
    return {**function, "arguments": arguments}


def _tools(written: Any) -> list[Mapping[str, Any]] | None:
    decoded = _decoded(drop_nulls(written)) or []
    tools = [_decoded(tool) for tool in decoded] if isinstance(decoded, list) else [None]
    found = [tool for tool in tools if isinstance(tool, Mapping)]
    if len(found) < len(tools):
        raise DataError("`tools` must be a list of objects, each the description of a tool, or that list as JSON")
    return found or None


def _decoded(value: Any) -> Any:
    """What a string of JSON holds; other strings and values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
