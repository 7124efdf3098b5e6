"""This module sums up several steps of a run: means over its ends, and the acceptance by draft position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from math import fsum

Row = Mapping[str, float | None]  # a step's metrics, as metrics.jsonl has them: None was not finite

WINDOW = 5  # steps of either end of a run that a figure sums up
CUMULATIVE = "spec/accept_rate_cum_pos_{}"
ROUNDS = "spec/verify_rounds"


def window_of(num_steps: int) -> int:
    """Return how many steps of either end a figure of a run sums up: fewer in a short run, so that ends differ."""
    return max(1, min(WINDOW, num_steps // 2))


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there; None where none is."""
    known = [value for value in values if value is not None]
    return fsum(known) / len(known) if known else None


def mean_of(name: str, rows: Sequence[Row]) -> float | None:
    """Return a metric's mean over the rows that have a finite value of it; None where none has."""
    return mean([row.get(name) for row in rows])


def pooled_by_position(rows: Sequence[Row]) -> tuple[float, ...]:
    """Return the share of all rounds that accepted draft position 0, 1, ...; empty where no row has such counts.

    Steps are pooled: each one's share is weighted with its rounds.
    """
    counted = [row for row in rows if row.get(CUMULATIVE.format(0)) is not None and row.get(ROUNDS)]
    num_rounds = fsum(row[ROUNDS] or 0.0 for row in counted)
    # A position that no round of a step accepted may be absent from that step.
    drafted = takewhile(lambda key: any(key in row for row in counted), map(CUMULATIVE.format, count()))
    return tuple(fsum((row.get(key) or 0.0) * (row[ROUNDS] or 0.0) for row in counted) / num_rounds for key in drafted)
