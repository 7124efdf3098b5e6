"""The sink writes metrics.jsonl: one JSON object per step, on disk before the next step begins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from slime_spec.config.tree import Config

FILE = "metrics.jsonl"


class JsonlSink:
    """Implements MetricSink; appends, so a resumed run goes on in the same file (its last line for a step counts)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    @classmethod
    def open(cls, config: Config, folder: Path) -> JsonlSink:
        return cls(folder / FILE)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line ``{"step": 3, "rollout/reward_mean": 0.25, ...}``; null stands for NaN and infinity."""
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()  # a killed process loses nothing that was logged

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Return every step's metrics in order, each step once: the last line written for it."""
    by_step = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]
