"""A Metric is a row of the table of metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Describes one metric, a row of the table of metrics.

    ``{i}`` in a name stands for a draft position (0 is the first drafted token), ``{task}`` for a task,
    ``{version}`` for a version of the weights, ``{rule}`` for a rule of verification, ``{reason}`` for a filter's,
    ``{set}`` for an evaluation set, ``{k}`` for a number of samples.
    """

    name: str
    unit: str
    meaning: str
