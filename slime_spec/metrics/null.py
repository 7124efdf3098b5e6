"""The null sink drops all metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slime_spec.config.tree import Config


class NullSink:
    """Implements MetricSink without writing anything."""

    @classmethod
    def open(cls, config: Config, folder: Path) -> NullSink:
        return cls()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        return

    def close(self) -> None:
        return
