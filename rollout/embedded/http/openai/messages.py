"""Messages are made what chat templates take: contents as text, arguments of tool calls as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slime_spec.errors import ConfigError
from slime_spec.files import parse_json_object

FRAME_BYTES = 256  # of the JSON around a text
SEND = "Send {'role': ..., 'content': ...}."


def template_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], longest_bytes: int
) -> list[dict[str, Any]]:
    """Return the messages for a chat template; raises ConfigError naming what is wrong with which.

    With the tools they have at most ``longest_bytes`` of text: more cannot fit in the context.
    """
    _check_text([*messages, *tools], longest_bytes + FRAME_BYTES * (len(messages) + len(tools)))
    return [_message(f"messages.{index}", message) for index, message in enumerate(messages)]


def text_of(content: object, name: str) -> str | None:
    """Return a content, which is a text, a list of parts of text, or absent; parts are joined as SGLang joins them."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError(name, "must be a text or a list of parts", content, SEND)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ConfigError(name, "must have parts of type text: this engine reads text only", kind, SEND)
        texts.append(part["text"])
    return " ".join(texts)


def _message(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise ConfigError(f"{name}.role", "must be a text such as user", role, SEND)
    content = text_of(message.get("content"), f"{name}.content")
    made = {**message, "content": "" if content is None else content}
    calls = message.get("tool_calls")
    if calls is None:
        made.pop("tool_calls", None)
        return made
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ConfigError(f"{name}.tool_calls", "must be a list of objects", calls, "Leave it out.")
    made["tool_calls"] = [_tool_call(f"{name}.tool_calls", call) for call in calls]
    return made


def _tool_call(name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return dict(call)
    where, remedy = f"{name}.function.arguments", "Send a JSON object as a text: '{...}'."
    arguments = parse_json_object(function["arguments"], where, remedy=remedy)
    return {**call, "function": {**function, "arguments": arguments}}


def _check_text(messages: Sequence[Mapping[str, Any]], longest_bytes: int) -> None:
    try:
        num_bytes = len(json.dumps(messages, ensure_ascii=False).encode())
    except RecursionError:
        raise ConfigError("messages", "must not be nested deeply", "?", SEND) from None
    if num_bytes > longest_bytes:
        rule = f"must have at most {longest_bytes} bytes: more cannot fit in the context"
        raise ConfigError("messages", rule, num_bytes, "Shorten them.")
