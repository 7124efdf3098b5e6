"""This module reads a finished run's acceptance by draft position from its metrics.jsonl."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path

from slime_spec.metrics.jsonl import FILE, read_metrics

KEY = "spec/accept_rate_cum_pos_{}"
ROUNDS = "spec/verify_rounds"


def acceptance_by_position(path: Path) -> tuple[float, ...]:
    """Return the share of all rounds that accepted draft position 0, 1, ...; empty where the run has no such counts.

    ``path`` is the file or its run folder; raises ConfigError for a file that is not a run's. Steps are pooled: each
    one's share is weighted with its rounds.
    """
    steps = read_metrics(path / FILE if path.is_dir() else path)
    counted = [step for step in steps if KEY.format(0) in step and step.get(ROUNDS)]
    num_rounds = sum(step[ROUNDS] or 0.0 for step in counted)
    # A position that no round of a step accepted may be absent from that step.
    drafted = takewhile(lambda key: any(key in step for step in counted), map(KEY.format, count()))
    return tuple(
        sum((step.get(key) or 0.0) * (step[ROUNDS] or 0.0) for step in counted) / num_rounds for key in drafted
    )
