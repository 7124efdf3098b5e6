"""This module reads a finished run's acceptance by draft position from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from slime_spec.metrics.jsonl import FILE, read_metrics
from slime_spec.metrics.summary import pooled_by_position


def acceptance_by_position(path: Path) -> tuple[float, ...]:
    """Return the share of all rounds that accepted draft position 0, 1, ...; empty where the run has no such counts.

    ``path`` is the file or its run folder; raises ConfigError for a file that is not a run's.
    """
    return pooled_by_position(read_metrics(path / FILE if path.is_dir() else path))
