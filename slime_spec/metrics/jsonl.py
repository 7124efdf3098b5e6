"""The sink writes metrics.jsonl: one JSON object per step, on disk before the next step begins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.files import MEND, LineFile, parse_json_object, read_text, shortened

FILE = "metrics.jsonl"
LARGEST = 1e300


class JsonlSink:
    """Implements MetricSink; appends, so a resumed run goes on in the same file.

    A line that an earlier run did not finish is cut off. A full disk is a ConfigError, and costs the new line alone.
    """

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    @classmethod
    def open(cls, config: Config, folder: Path) -> JsonlSink:
        return cls(folder / FILE)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line ``{"step": 3, "rollout/reward_mean": 0.25, ...}``; null stands for NaN and infinity."""
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._file.append(json.dumps(row, allow_nan=False))

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Return every step's metrics in order, each step once: the last line written for it.

    None stands for what is not finite, as another tool may have written it. A last line without its end (the run is
    writing it, or was killed) is left out. Raises ConfigError naming the file
    and the line for any other line that is no row.
    """
    by_step: dict[int, dict[str, float | None]] = {}
    lines = read_text(path, remedy=f"Give the {FILE} of a run.").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        row = parse_json_object(line, f"{path}:{number}", remedy=MEND)
        if type(step := row.get("step")) is not int:
            raise ConfigError(f"{path}:{number}", "must have the number of its step", step, MEND)
        if not all(value is None or isinstance(value, int | float) for value in row.values()):
            raise ConfigError(f"{path}:{number}", "must hold numbers alone", shortened(line), MEND)
        by_step[step] = {**{name: _finite(value) for name, value in row.items()}, "step": step}
    return [by_step[step] for step in sorted(by_step)]


def _finite(value: float | None) -> float | None:
    """Return a number as it is; None where it, or a sum of a few such, is beyond a float's range."""
    return value if value is not None and -LARGEST < value < LARGEST else None
