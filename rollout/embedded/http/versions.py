"""SGLang's weight versions are texts that a client chooses, the engine's are integers: which stands for which."""

from __future__ import annotations

from collections.abc import Callable

from slime_spec.types import GeneratedSample

FIRST = "default"  # SGLang's name of the weights a server starts with


class VersionNames:
    """The name of every version this server has served; a push made past it goes by its number.

    ``version_in_use`` asks the engine.
    """

    def __init__(self, version_in_use: Callable[[], int]) -> None:
        self._version_in_use = version_in_use
        self._names = {0: FIRST}

    def current(self) -> str:
        return self.name(self._version_in_use())

    def name(self, version: int) -> str:
        return self._names.get(version, str(version))

    def give(self, version: int, name: str) -> None:
        self._names[version] = name

    def spans(self, sample: GeneratedSample) -> list[dict[str, object]]:
        """SGLang's ``weight_versions``: [{"version", "start", "end"}] over the response's tokens."""
        starts = sample.version_spans or ((0, sample.weight_version),)
        ends = [*(start for start, _ in starts[1:]), len(sample.token_ids)]
        return [
            {"version": self.name(version), "start": start, "end": end}
            for (start, version), end in zip(starts, ends, strict=True)
        ]
