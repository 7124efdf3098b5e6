"""This module makes the tables of a page: final numbers, every metric, and the settings that runs differ in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slime_spec.config.schema import settings
from slime_spec.errors import ConfigError
from slime_spec.metrics.console import LINE
from slime_spec.metrics.metric import Metric
from slime_spec.metrics.summary import WINDOW, mean
from slime_spec.metrics.table import metric
from slime_spec.report.folder import ReportedRun

# What the table of final numbers has beside the metrics of a step's line on the terminal.
ALSO = ("spec/net_speedup_err", "spec/break_even_length", "sync/checksum_ok", "spec/draft_version_lag")
ABSENT = "–"


@dataclass(frozen=True)
class Number:
    """Holds a figure as it is shown, and exactly; both are None where a run has no such metric."""

    exact: float | None
    shown: str


@dataclass(frozen=True)
class NumberRow:
    """Holds a metric's figures of each run: the means of its first and of its last values, and the last."""

    name: str
    unit: str
    meaning: str
    runs: tuple[tuple[Number, Number, Number], ...]


@dataclass(frozen=True)
class SettingRow:
    """Holds a setting's value in each run, beside the default; ``differs`` says that the runs do not agree."""

    path: str
    default: str
    values: tuple[str, ...]
    differs: bool
    help: str

    @property
    def is_set(self) -> bool:
        return any(value != self.default for value in self.values)


def final_numbers(runs: Sequence[ReportedRun], window: int = WINDOW) -> list[NumberRow]:
    """Return the rows of the table of final numbers: the terminal's metrics and evaluations, where a run has them."""
    evaluated = [name for run in runs for name in run.names if name.startswith("eval/")]
    wanted = [*(name for name, _, _ in LINE), *ALSO, *dict.fromkeys(evaluated)]
    return [_number_row(name, runs, window) for name in wanted if any(name in run.names for run in runs)]


def all_numbers(runs: Sequence[ReportedRun], window: int = WINDOW) -> list[NumberRow]:
    """Return a row for every metric of any run."""
    return [_number_row(name, runs, window) for name in sorted({name for run in runs for name in run.names})]


def about(name: str) -> Metric | None:
    """Return a metric's row of the table of metrics; None for one that this version does not know."""
    try:
        return metric(name)
    except ConfigError:
        return None


def _number_row(name: str, runs: Sequence[ReportedRun], window: int) -> NumberRow:
    known = about(name)
    cells = []
    for run in runs:
        values = [value for _, value in run.points(name)]
        ends = (mean(values[:window]), mean(values[-window:]), values[-1] if values else None)
        first, late, at_end = (_number(value, bool(values)) for value in ends)
        cells.append((first, late, at_end))
    return NumberRow(name, known.unit if known else "", known.meaning if known else "", tuple(cells))


def _number(value: float | None, has_it: bool) -> Number:
    if value is None:
        return Number(None, "not finite" if has_it else ABSENT)
    return Number(value, shown(value))


def shown(value: float) -> str:
    """Return a figure in at most four significant digits, large ones with their thousands apart."""
    if not math.isfinite(value):
        return "not finite"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.3e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 3 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def setting_rows(runs: Sequence[ReportedRun]) -> list[SettingRow]:
    """Return every setting of the runs, in the tree's order; those that this version does not know come last."""
    known = settings()
    paths = [*known, *sorted({path for run in runs for path in run.settings if path not in known})]
    rows = []
    for path in paths:
        values = [run.settings.get(path) for run in runs]
        if any(path in run.settings for run in runs):
            default = _written(known[path].default) if path in known else ABSENT
            texts = tuple(_written(v) if path in run.settings else ABSENT for v, run in zip(values, runs, strict=True))
            help = known[path].help if path in known else ""
            rows.append(SettingRow(path, default, texts, len(set(texts)) > 1, help))
    return rows


def _written(value: Any) -> str:
    """Return a setting's value as a command line takes it."""
    if isinstance(value, tuple | list):
        return f"[{','.join(_written(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
