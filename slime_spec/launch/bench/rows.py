"""The rows that every benchmark writes."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from slime_spec.run_folder import versions


@dataclass(frozen=True)
class Row:
    """One figure: ``Row("push.ratio", "push / plain copy", 2.1, "x", reach="<= 3", holds=True)``.

    ``holds`` is None where nothing was promised.
    """

    id: str
    what: str
    value: float
    unit: str
    reach: str = ""
    holds: bool | None = None


def at_least(id: str, what: str, value: float, unit: str, bound: float) -> Row:
    return Row(id, what, value, unit, f">= {bound:g}", value >= bound)


def at_most(id: str, what: str, value: float, unit: str, bound: float) -> Row:
    return Row(id, what, value, unit, f"<= {bound:g}", value <= bound)


@dataclass(frozen=True)
class Benchmark:
    """A named set of parts, each a function from seeds to rows."""

    what: str
    parts: Mapping[str, Callable[[tuple[int, ...]], list[Row]]]


def rows_table(rows: Sequence[Row]) -> Table:
    table = Table()
    for column, justify in (("id", "left"), ("what", "left"), ("value", "right"), ("reach", "left"), ("holds", "left")):
        table.add_column(column, justify="right" if justify == "right" else "left")
    for row in rows:
        holds = {True: "yes", False: "NO", None: ""}[row.holds]
        table.add_row(row.id, row.what, f"{row.value:.4g} {row.unit}", row.reach, holds)
    return table


def report_json(rows: Sequence[Row], command: Sequence[str], seeds: Sequence[int]) -> str:
    """The rows with everything needed to repeat them."""
    return json.dumps(
        {
            "rows": [asdict(row) for row in rows],
            "machine": machine(),
            "versions": versions(),
            "seeds": list(seeds),
            "command": shlex.join(command),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        indent=2,
    )


def machine() -> dict[str, object]:
    """Processor, cores and memory of this machine."""
    cpu_info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
