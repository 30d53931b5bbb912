"""Joins AbstractLLM's prompt, system prompt, messages and files to one conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from abstractllm.exceptions import (
    FileProcessingError,
    InvalidRequestError,
    UnsupportedFeatureError,
)
from abstractllm.media.factory import MediaFactory
from abstractllm.media.image import ImageInput

from mlxd.abstractllm.errors import PROVIDER

Conversation = list[dict[str, Any]]


def conversation(
    prompt: str | None,
    system_prompt: str | None,
    messages: Sequence[Any] | None,
    files: Sequence[Any] | None,
    expand: Callable[[str], str],
    tools_prompt: str | None = None,
) -> Conversation:
    """Returns the conversation to answer.

    A caller may pass the prompt and, like Session, messages that already end with it; it is not
    repeated. An older message of the same text is another one. `expand` replaces `@file` references
    by text, as was done with the prompt: the message that expands to the prompt is that prompt.
    `tools_prompt` describes tools to a model whose template has none; it ends the system message.

    Raises:
        InvalidRequestError: there is nothing to answer.
        UnsupportedFeatureError: a part is not text.
        FileProcessingError: a file cannot be read.
    """
    result = [_message(message) for message in messages or ()]
    target = _place_prompt(result, prompt, expand)
    if files:
        if target is None:
            raise InvalidRequestError("files without a user message", provider=PROVIDER)
        target["content"] = "\n\n".join([*map(_file_text, files), target["content"]]).strip()
    if not result:
        raise InvalidRequestError("neither prompt nor messages", provider=PROVIDER)
    _place_system(result, system_prompt)
    _place_tools(result, tools_prompt)
    return result


def _place_prompt(
    result: Conversation, prompt: str | None, expand: Callable[[str], str]
) -> dict[str, Any] | None:
    """Puts the prompt into the messages and returns the user message that takes the files."""
    asked = _unanswered(result)
    if not prompt:
        users = (m for m in reversed(result) if m["role"] == "user" and not _is_tool_result(m))
        return asked or next(users, None)
    if asked is not None:
        text, content = prompt.strip(), asked["content"]
        if content.strip() == text or ("@" in content and expand(content).strip() == text):
            asked["content"] = prompt
            return asked
    added = {"role": "user", "content": prompt}
    result.append(added)
    return added


def _unanswered(result: Conversation) -> dict[str, Any] | None:
    """Returns the user message that the model has yet to answer, None if it answered the last one.

    In a tool loop only calls and their results follow that message.
    """
    follower = None
    for message in reversed(result):
        called = follower is not None and _is_tool_result(follower)
        if message["role"] == "assistant" and not called:
            return None
        if message["role"] == "user" and not _is_tool_result(message):
            return message
        follower = message
    return None


def _is_tool_result(message: dict[str, Any]) -> bool:
    """Tells whether a message is a tool's result, which Session writes as the user's."""
    starts = ("[Tool Result: ", "[SYSTEM: Tool execution result]")
    return message["role"] == "tool" or message["content"].startswith(starts)


def _place_system(result: Conversation, system_prompt: str | None) -> None:
    """Puts the system prompt first. A system message that begins with it stays: it is longer."""
    if not system_prompt:
        return
    if result[0]["role"] != "system":
        result.insert(0, {"role": "system", "content": system_prompt})
    elif not result[0]["content"].startswith(system_prompt.strip()):
        result[0]["content"] = system_prompt


def _place_tools(result: Conversation, tools_prompt: str | None) -> None:
    """Ends the system message, the conversation's own too, with the tools' description."""
    if not tools_prompt:
        return
    if result[0]["role"] != "system":
        result.insert(0, {"role": "system", "content": tools_prompt})
    elif tools_prompt not in result[0]["content"]:
        result[0]["content"] = "\n\n".join(filter(None, (result[0]["content"], tools_prompt)))


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):  # abstractllm.types.Message
        message = message.to_dict()
    role = message.get("role")
    result = {
        "role": str(role.value) if isinstance(role, Enum) else role,
        "content": _text(message.get("content")),
    }
    for key in ("name", "tool_calls", "tool_call_id"):
        if message.get(key):
            result[key] = message[key]
    return result


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    texts: list[str] = []
    for part in parts:
        is_text = not isinstance(part, Mapping) or part.get("type", "text") == "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if not is_text or not isinstance(text, str):
            raise UnsupportedFeatureError(
                "vision", message="the daemon serves text models", provider=PROVIDER
            )
        texts.append(text)
    return "".join(texts)


def is_text_file(source: Any) -> bool:
    """Tells whether a file can be inlined as text."""
    try:
        return not isinstance(MediaFactory.from_source(source), ImageInput)
    except Exception:  # MediaFactory raises bare Exceptions.
        return False


def _file_text(source: Any) -> str:
    try:
        media = MediaFactory.from_source(source)
    except Exception as error:  # MediaFactory raises bare Exceptions.
        raise FileProcessingError(
            f"cannot use the file {source!s}: {error}",
            provider=PROVIDER,
            original_exception=error,
            file_path=str(source),
        ) from error
    if isinstance(media, ImageInput):
        raise UnsupportedFeatureError(
            "vision", message="the daemon serves text models", provider=PROVIDER
        )
    try:
        content = media.get_content()
    except Exception as error:  # MediaFactory raises bare Exceptions.
        raise FileProcessingError(
            f"cannot read the file {source!s}: {error}",
            provider=PROVIDER,
            original_exception=error,
            file_path=str(source),
            file_type=media.mime_type,
        ) from error
    return f"File {Path(str(source)).name}:\n{content}"
