"""Conversations: messages and tools, from Python values to the API and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct

from mlxd._fields import BAD_VALUE, enum_value, put
from mlxd.errors import invalid
from mlxd.types import Message, Messages, ToolCall
from mlxd.v1 import inference_pb2 as pb

_MESSAGE = frozenset(Message.__annotations__)
_ROLES = {
    "system": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
    "developer": pb.ROLE_DEVELOPER,
}


def chat_input(
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    *,
    tool_choice: str | Mapping[str, Any] | None = None,
    tool_format: str | None = None,
    **flags: bool | None,
) -> pb.ChatInput:
    """Builds a conversation; a plain string is one user message."""
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    chat = pb.ChatInput()
    for name, flag in flags.items():
        if flag is not None:
            put(chat, name, flag)
    for index, message in enumerate(given):
        chat.messages.append(_message(message, f"chat.messages[{index}]"))
    for index, tool in enumerate(tools or ()):
        chat.tools.append(_tool(tool, f"chat.tools[{index}]"))
    if template_arguments is not None:
        try:
            chat.template_arguments.CopyFrom(ParseDict(dict(template_arguments), Struct()))
        except (ParseError, *BAD_VALUE) as error:
            raise invalid("chat.template_arguments", str(error)) from error
    if tool_choice is not None:
        _set_choice(chat.tool_choice, tool_choice)
    chat.tool_format = enum_value(pb.ToolFormat, "tool_format", tool_format)
    return chat


def _set_choice(choice: pb.ToolChoice, given: str | Mapping[str, Any]) -> None:
    """Sets a rule by its name, or the tool to call as OpenAI writes it."""
    if isinstance(given, str):
        mode = enum_value(pb.ToolChoiceMode, "tool_choice_mode", given)
        put(choice, "mode", mode, "chat.tool_choice")
    else:
        put(choice, "function", _function(given, "chat.tool_choice")["name"], "chat.tool_choice")


def _message(message: Any, path: str) -> pb.Message:
    if isinstance(message, pb.Message):
        return message
    if not isinstance(message, Mapping):
        raise invalid(path, f"expected a mapping with role and content, got {type(message)!r}")
    unknown = message.keys() - _MESSAGE
    if unknown:
        raise invalid(path, f"unknown keys: {', '.join(sorted(map(str, unknown)))}")
    role = message.get("role")
    value = _ROLES.get(str(role))
    if value is None:
        raise invalid(f"{path}.role", f"unknown role {role!r}")
    result = pb.Message(role=value)
    content = message.get("content")
    parts = [content] if isinstance(content, str) else content or ()
    if isinstance(parts, Mapping) or not isinstance(parts, Sequence):
        raise invalid(f"{path}.content", "expected text or a list of text parts")
    for index, part in enumerate(parts):
        _add_part(result, part, f"{path}.content[{index}]")
    put(result, "name", message.get("name") or "", f"{path}.name")
    put(result, "tool_call_id", message.get("tool_call_id") or "", f"{path}.tool_call_id")
    put(result, "reasoning", message.get("reasoning") or "", f"{path}.reasoning")
    for index, call in enumerate(message.get("tool_calls") or ()):
        result.tool_calls.append(_tool_call(call, f"{path}.tool_calls[{index}]"))
    return result


def _add_part(message: pb.Message, part: Any, path: str) -> None:
    if isinstance(part, Mapping):
        if part.keys() - {"type", "text"} or part.get("type", "text") != "text":
            raise invalid(path, "only text parts are supported")
        part = part.get("text")
    put(message.content.add(), "text", part, path)


def _function(value: Any, path: str) -> Mapping[str, Any]:
    """Unwraps OpenAI's `{"type": "function", "function": {…}}`, else returns the value."""
    if not isinstance(value, Mapping):
        raise invalid(path, f"expected a mapping, got {type(value)!r}")
    inner = value.get("function", value)
    if not isinstance(inner, Mapping) or not inner.get("name"):
        raise invalid(path, "has no name")
    return inner


def _tool_call(call: Any, path: str) -> pb.ToolCall:
    if isinstance(call, pb.ToolCall):
        return call
    if isinstance(call, ToolCall):
        return pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
    inner = _function(call, path)
    result = pb.ToolCall()
    put(result, "id", call.get("id") or "", f"{path}.id")
    put(result, "name", inner["name"], f"{path}.name")
    arguments = inner.get("arguments", {})
    text = arguments if isinstance(arguments, str) else _json(arguments, f"{path}.arguments")
    put(result, "arguments_json", text, f"{path}.arguments")
    return result


def _tool(tool: Any, path: str) -> pb.ToolDefinition:
    if isinstance(tool, pb.ToolDefinition):
        return tool
    inner = _function(tool, path)
    result = pb.ToolDefinition()
    put(result, "name", inner["name"], f"{path}.name")
    put(result, "description", inner.get("description") or "", f"{path}.description")
    parameters = inner.get("parameters")
    if parameters:
        result.parameters_json = _json(parameters, f"{path}.parameters")
    return result


def _json(value: Any, path: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise invalid(path, str(error)) from error
