"""Tool calls are read out of a reply where the chat template shows the form in which its model writes them.

A reply without calls, or with a call that is cut off or no call at all, is text and stays text. transformers reads
replies by a checkpoint's own response_schema, which are regular expressions of a stranger to run over any text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import uuid4

from slime_spec.errors import ConfigError
from slime_spec.files import parse_json


class ToolCall(NamedTuple):
    """Holds one call; ``arguments`` are a JSON object as a text, as OpenAI has them."""

    name: str
    arguments: str

    def shown(self) -> dict[str, Any]:
        return {"id": f"call_{uuid4().hex}", "type": "function", "function": self._asdict()}


class Reply(NamedTuple):
    """Holds what is text of a reply, and its calls."""

    text: str
    calls: Sequence[ToolCall] = ()


@dataclass(frozen=True)
class ToolFormat:
    """Says between which marks a model writes JSON of a call, or a list of them; without an end mark it is the rest."""

    start: str
    end: str = ""

    def read(self, text: str) -> Reply:
        """Read a whole reply. What is no call is its text: up to the first call it is what ``visible`` has shown."""
        calls: list[ToolCall] = []
        pieces: list[str] = []
        place = 0
        while (start := text.find(self.start, place)) >= 0:
            first = start + len(self.start)
            end = text.find(self.end, first) if self.end else len(text)
            found = calls_in(text[first:end]) if end >= 0 else []
            if not found:
                return Reply(text)
            pieces.append(text[place:start].strip() if calls else text[:start].rstrip())
            calls += found
            place = end + len(self.end)
        if not calls:
            return Reply(text)
        pieces.append(text[place:].strip())
        head, *rest = pieces
        return Reply("\n".join([head, *filter(None, rest)]), calls)

    def visible(self, text: str) -> str:
        """Return what is text for certain of a reply that grows: no part of a call, and no space before a call."""
        start = text.find(self.start)
        if start < 0:
            lengths = range(min(len(self.start) - 1, len(text)), 0, -1)
            start = len(text) - next((each for each in lengths if text.endswith(self.start[:each])), 0)
        return text[:start].rstrip()


HERMES = ToolFormat("<tool_call>", "</tool_call>")  # and Qwen
MISTRAL = ToolFormat("[TOOL_CALLS]")
FORMATS = (HERMES, MISTRAL)


def tool_format(template: str) -> ToolFormat | None:
    """Return the format that a chat template shows; None where none is known."""
    return next((each for each in FORMATS if each.start in template), None)


def calls_in(text: str) -> list[ToolCall]:
    """Return the calls that a text is; none where any of it is no call."""
    try:
        found = parse_json(text.strip(), "tool_call", remedy="", finite=True)
        calls = list(map(_call, found if isinstance(found, list) else [found]))
    except ConfigError:
        return []
    return [] if None in calls else [call for call in calls if call is not None]


def _call(value: object) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parse_json(arguments, "arguments", remedy="", finite=True)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
