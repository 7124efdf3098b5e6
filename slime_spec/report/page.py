"""This module writes the page: HTML with its style, its scripts and its numbers inside, and no address of anything.

Texts of a run reach the page through a template that escapes them, and numbers and names of charts as JSON without
``<``; the page's policy (Content-Security-Policy) lets a browser run the two scripts of known hash, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from slime_spec.errors import ConfigError
from slime_spec.files import write_whole
from slime_spec.metrics.summary import window_of
from slime_spec.report.charts import charts_of
from slime_spec.report.folder import ReportedRun
from slime_spec.report.measured import MeasuredTable
from slime_spec.report.numbers import all_numbers, final_numbers, setting_rows
from slime_spec.report.series import ChartData, described, thinned

FILE = "report.html"
MOST_VALUES = 100_000  # of all charts, some 10 bytes each: longer runs are drawn with fewer points
DIGITS = 6  # significant digits of a value in a chart; the tables have the exact values
ASSETS = files("slime_spec.report") / "assets"


@dataclass(frozen=True)
class Page:
    """Says what a page shows: runs, tables of measurements, and the seconds after which an open page reads itself."""

    runs: Sequence[ReportedRun]
    measured: Sequence[MeasuredTable] = ()
    reload_s: float | None = None


def write_page(path: Path, page: Page) -> None:
    """Write the page as a whole file; raises ConfigError where the file cannot be written.

    Several processes may write it at once: a run writes its own, and a command may watch the run.
    """
    text = html(page, datetime.now(UTC))
    own = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_whole(own, text)
        os.replace(own, path)
    except OSError as error:
        with suppress(OSError):
            own.unlink()
        rule = f"must be a file that can be written: {error.strerror or error}"
        raise ConfigError("--out", rule, str(path), "Make its folder first, or pass another file.") from None


def html(page: Page, now: datetime) -> str:
    """Return the text of the page, written at ``now``."""
    sections = charts_of(page.runs)
    charts = [chart for _, charts in sections for chart in charts]
    num_values = sum(len(line.points) + 2 * len(line.band) for chart in charts for line in chart.lines)
    step_width = max(1, ceil(num_values / MOST_VALUES))
    window = window_of(max((len(run.steps) for run in page.runs), default=0))
    numbered = {id(chart): number for number, chart in enumerate(charts)}
    data = {
        "runs": [run.name for run in page.runs],
        "charts": [chart_json(chart, step_width) for chart in charts],
        "reloadSeconds": page.reload_s,
    }
    scripts = {name: _asset(name) for name in ("uPlot.iife.min.js", "page.js")}
    return _template().render(
        page=page,
        sections=sections,
        number_of=lambda chart: numbered[id(chart)],
        described=described,
        numbers=final_numbers(page.runs, window),
        every_number=all_numbers(page.runs, window),
        settings=setting_rows(page.runs),
        window=window,
        step_width=step_width,
        now=now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        data=Markup(json_of(data)),
        scripts={name: Markup(text) for name, text in scripts.items()},
        hashes=" ".join(_hash(text) for text in scripts.values()),
        styles=Markup(_asset("uPlot.min.css") + _asset("page.css")),
    )


def chart_json(chart: ChartData, step_width: int) -> dict[str, Any]:
    """Return a chart as the page's script reads it, with one point for ``step_width`` steps."""
    width = step_width if chart.x_label == "step" else 1
    lines = [thinned(line, width) for line in chart.lines]
    return {
        "title": chart.title,
        "unit": chart.unit,
        "kind": chart.kind,
        "rule": chart.rule,
        "log": chart.log,
        "xLabel": chart.x_label,
        "lines": [
            {
                "run": line.run,
                "label": line.label,
                "dashed": line.dashed,
                "shade": line.shade,
                **_xs([x for x, _ in line.points]),
                "y": [_rounded(value) for _, value in line.points],
                "low": [_rounded(low) for low, _ in line.band],
                "high": [_rounded(high) for _, high in line.band],
            }
            for line in lines
        ],
    }


def _xs(xs: Sequence[int]) -> dict[str, Any]:
    """Return the list of x; where all are equally far apart, the first and the distance alone."""
    every = xs[1] - xs[0] if len(xs) > 1 else 1
    evenly = range(xs[0], xs[0] + every * len(xs), every) if xs and every > 0 else ()
    return {"start": xs[0], "every": every} if [*evenly] == [*xs] and xs else {"x": [*xs]}


def json_of(data: Any) -> str:
    """Return JSON that may stand within a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _rounded(value: float | None) -> float | int | None:
    if value is None:
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    loader = PackageLoader("slime_spec.report", "assets")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja")
