"""This module makes lines of charts from metrics of runs: values by step, phases, positions, ages of weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import fsum

from slime_spec.metrics.summary import CUMULATIVE, WINDOW, Row, mean, pooled_by_position
from slime_spec.report.folder import ReportedRun

# (phase, its metric, the metric of the part of it that is a phase of its own).
PHASES = (
    ("rollout", "perf/rollout_time", None),
    ("train", "perf/train_time", "perf/draft_train_time"),
    ("train the draft", "perf/draft_train_time", None),
    ("push", "perf/sync_time", None),
    ("push the draft", "perf/draft_sync_time", None),
)
WHOLE = "perf/step_time"
BY_VERSION = "spec/accept_length_by_version/"
NUMBER = re.compile("[0-9]{1,18}")  # in a metric's name; a file may hold what this project never wrote
Point = tuple[int, float | None]
Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Line:
    """Holds the (x, value) points of one line of the run with this index; None is a value that was not finite.

    ``band`` has the interval of each value, and is empty where none is known. ``shade`` numbers the colours of lines
    that have one each.
    """

    run: int
    label: str
    points: tuple[Point, ...]
    dashed: bool = False
    band: tuple[Interval, ...] = ()
    shade: int = 0


@dataclass(frozen=True)
class ChartData:
    """Holds one chart. ``kind`` is "lines" (a colour a run), "shades" (a colour a line) or "stacked"."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    kind: str = "lines"
    note: str = ""
    rule: float | None = None
    log: bool = False
    x_label: str = "step"


def line_of(
    run: ReportedRun,
    index: int,
    name: str,
    label: str = "",
    dashed: bool = False,
    error: str | None = None,
    ends: tuple[str, str] | None = None,
    shade: int = 0,
) -> Line:
    """Return a metric's line.

    ``error`` is the metric of what its values may be off by, ``ends`` are the metrics of an interval's ends.
    """
    points = tuple(run.points(name))
    band: tuple[Interval, ...] = ()
    if error in run.names:
        errors = dict(run.points(error or ""))
        band = tuple(_around(value, errors.get(step)) for step, value in points)
    elif ends is not None and set(ends) <= set(run.names):
        low, high = (dict(run.points(end)) for end in ends)
        band = tuple((low.get(step), high.get(step)) for step, _ in points)
    return Line(index, label, points, dashed, band, shade)


def _around(value: float | None, error: float | None) -> Interval:
    return (None, None) if value is None or error is None else (value - error, value + error)


def phase_lines(run: ReportedRun, index: int) -> tuple[Line, ...]:
    """Return the seconds of each phase by step, and of what no phase counts; phases without any time are left out."""
    steps = [row for row in run.rows if row.get(WHOLE) is not None]
    phases = {name: [_phase_s(row, metric, part) for row in steps] for name, metric, part in PHASES}
    spent = [fsum(values) for values in zip(*phases.values(), strict=True)]
    phases["other"] = [max(0.0, (row[WHOLE] or 0.0) - sum_s) for row, sum_s in zip(steps, spent, strict=True)]
    numbers = [int(row["step"] or 0) for row in steps]
    return tuple(
        Line(index, name, tuple(zip(numbers, values, strict=True)), shade=shade)
        for shade, (name, values) in enumerate(phases.items())
        if any(values)
    )


def _phase_s(row: Row, metric: str, part: str | None) -> float:
    return max(0.0, (row.get(metric) or 0.0) - ((row.get(part) or 0.0) if part else 0.0))


def staleness_lines(run: ReportedRun, index: int) -> tuple[Line, ...]:
    """Return the accepted length by how many versions a sample's oldest weights are behind the step's newest."""
    by_age: dict[int, list[Point]] = defaultdict(list)
    for step, row in zip(run.steps, run.rows, strict=True):
        named = ((name.removeprefix(BY_VERSION), name) for name in row if name.startswith(BY_VERSION))
        versions = {int(version): name for version, name in named if NUMBER.fullmatch(version)}
        newest = row.get("rollout/weight_version_max")
        newest = max(versions, default=0) if newest is None else int(newest)
        for version, name in sorted(versions.items(), reverse=True):
            by_age[newest - version].append((step, row[name]))
    return tuple(
        Line(index, f"{age} behind" if age else "newest weights", tuple(by_age[age]), shade=shade)
        for shade, age in enumerate(sorted(by_age))
    )


def by_position(runs: Sequence[ReportedRun]) -> Iterator[ChartData]:
    """Yield the acceptance by draft position of each run's last steps, and dashed of its first ones."""
    lines = []
    for index, run in enumerate(runs):
        counted = [row for row in run.rows if CUMULATIVE.format(0) in row]
        ends = {f"last {WINDOW} steps": counted[-WINDOW:], f"first {WINDOW} steps": counted[:WINDOW]}
        for label, rows in ends.items():
            shares = pooled_by_position(rows)
            if shares and (label.startswith("last") or len(counted) > WINDOW):
                lines.append(Line(index, label, tuple(enumerate(shares)), dashed=label.startswith("first")))
    if lines:
        note = "Rounds that accepted this position and all before it, pooled over the steps."
        yield ChartData("Acceptance by draft position", "share of rounds", tuple(lines), note=note, x_label="position")


def thinned(line: Line, num_steps: int) -> Line:
    """Return the line with one point for ``num_steps`` of its points: the mean of those that are finite."""
    if num_steps <= 1:
        return line
    starts = range(0, len(line.points), num_steps)
    parts = [line.points[start : start + num_steps] for start in starts]
    bands = [line.band[start : start + num_steps] for start in starts] if line.band else []
    return replace(
        line,
        points=tuple((part[0][0], mean([value for _, value in part])) for part in parts),
        band=tuple((mean([low for low, _ in part]), mean([high for _, high in part])) for part in bands),
    )


def described(line: Line) -> str:
    """Return a sentence on a line for who cannot see it: ``from 0.31 at 0 to 0.94 at 24, between 0.3 and 0.95``."""
    known = [(x, value) for x, value in line.points if value is not None]
    if not known:
        return "no finite value"
    values = [value for _, value in known]
    (first_x, first), (last_x, last) = known[0], known[-1]
    if len(known) == 1:
        return f"{first:.4g} at {first_x}"
    return f"from {first:.4g} at {first_x} to {last:.4g} at {last_x}, between {min(values):.4g} and {max(values):.4g}"
