"""A Tally adds up what one server's responses say of speculation, in as little room as a step of any length takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from itertools import zip_longest
from typing import Any

from slime_spec.integrations.answers import Answer, kept
from slime_spec.sglang.metadata import ROUNDS

VERSIONS = ("weight_version", "draft_version", "lossy")
ITERATIONS = "iter_count"  # of one response: the prefill's, and those after it


class Tally:
    """Keeps sums of finished responses, until somebody takes them; those alike in versions and keys are one."""

    def __init__(self) -> None:
        self._sums: dict[object, dict[str, Any]] = {}

    def note(self, output: Any) -> None:
        meta_info = output.get("meta_info") if isinstance(output, Mapping) else None
        if not meta_info or meta_info.get("finish_reason") is None:  # of a stream, the last chunk counts
            return
        answer = kept(meta_info)
        counts = {name: value for name, value in answer.items() if _is_count(value) and name not in VERSIONS}
        versions = {name: answer[name] for name in VERSIONS if name in answer}
        alike = (tuple(versions.items()), frozenset(counts), bool(answer.get(ROUNDS)))
        sums = self._sums.setdefault(alike, dict(versions))
        for name, value in counts.items():
            sums[name] = _added(name, sums[name], value) if name in sums else value

    def take(self) -> list[Answer]:
        """Return the sums as answers, each of all responses alike, and begin anew."""
        taken, self._sums = list(self._sums.values()), {}
        return list(taken)

    def watch(self, manager: Any) -> None:
        """Note all that one tokenizer manager of SGLang's generates from now on."""
        generate = manager.generate_request

        async def generate_request(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            async for output in generate(*args, **kwargs):
                self.note(output)
                yield output

        manager.generate_request = generate_request


def _is_count(value: object) -> bool:
    """Return whether a value can be added up: ratios cannot."""
    return type(value) is int or (isinstance(value, list) and all(type(each) is int for each in value))


def _added(name: str, before: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [one + other for one, other in zip_longest(before, value, fillvalue=0)]
    return before + value - (name == ITERATIONS)  # one prefill for all, as a reader of one response takes off
