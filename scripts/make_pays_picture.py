"""Draw docs/pays.svg, what speculation pays: ``python scripts/make_pays_picture.py UNTRAINED.json TRAINED.json``.

The files are what ``slime-spec bench pays --json FILE`` wrote, any number of them: each scenario of a policy once.
Their numbers go into the table of docs/measurements.md, and the picture is drawn from that; without files it is drawn
anew.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

from slime_spec.bench.pays.scenarios import LONGEST_IN_JOB, Scenario, scenarios

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENT, PICTURE = DOCS / "measurements.md", DOCS / "pays.svg"
BEGIN, END = "<!-- made by scripts/make_pays_picture.py -->\n", "<!-- end -->\n"
HEAD = (
    "| scenario | policy | rule | over no speculation | each repetition | bound | the reply itself as its draft |\n"
    "|---|---|---|---:|---|---|---:|\n"
)
ABOUT = "![Speed-up over no speculation by scenario, before and after training](pays.svg)\n"

SCENARIOS: Mapping[str, Scenario] = scenarios(LONGEST_IN_JOB)
NAMES = {"64": "64 at once", "64_tail": "64, long tail", "longtail": "the long-tail job"}
POLICIES = {"untrained": "before training", "trained": "after training"}
ID = re.compile(
    rf"pays\.(?P<policy>{'|'.join(POLICIES)})(\.(?P<rule>[a-z_]+))?\.(?P<scenario>{'|'.join(SCENARIOS)})"
    r"\.(?P<side>auto|perfect)\.speedup"
)

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 84, 82
TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
COLOURS = {"untrained": "#64748b", "trained": "#1b6ca8"}
MISSES = "#c2410c"
LABEL_HEIGHT = 16  # of a number, pixels


@dataclass(frozen=True)
class Figure:
    """Holds a row of the table: ``Figure("64_tail", "trained", "target_only", 1.21, (1.19, 1.21, 1.24), 1.15, 1.4)``.

    ``median`` and ``each`` are speed-ups over no speculation, of all repetitions and of each; ``bound`` is the least
    median that is promised, ``perfect`` the median where every draft is right and costs nothing.
    """

    scenario: str
    policy: str
    rule: str
    median: float
    each: tuple[float, ...]
    bound: float | None
    perfect: float | None = None

    @property
    def holds(self) -> bool:
        return self.bound is None or self.median >= self.bound


def figures_of(reports: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return the figures of the benchmark's reports, in the order of the scenarios.

    Raises ValueError for reports without any, and for a scenario that was measured twice with the same policy.
    """
    found: dict[tuple[str, str], Figure] = {}
    perfect: dict[tuple[str, str], float] = {}
    for row in (row for report in reports for row in report["rows"]):
        if named := ID.fullmatch(row["id"]):
            key = (named["scenario"], named["policy"])
            if named["side"] == "perfect":
                perfect[key] = float(f"{row['value']:.4g}")
                continue
            if key in found:
                raise ValueError(f"scenario {key[0]} of the {key[1]} policy was measured twice: give one of the files")
            each = tuple(float(value) for value in row["what"].rpartition("each ")[2].split(", "))
            bound = float(row["reach"].removeprefix(">= ")) if row["reach"] else None
            rule = named["rule"] or "target_only"
            found[key] = Figure(*key, rule, float(f"{row['value']:.4g}"), each, bound)
    if not found:
        raise ValueError("no file has a row pays.POLICY.SCENARIO.auto.speedup: give the JSON of slime-spec bench pays")
    places = ((name, policy) for name in SCENARIOS for policy in POLICIES)
    return [replace(found[place], perfect=perfect.get(place)) for place in places if place in found]


def block(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return what stands in docs/measurements.md: each report's origin, then the table."""
    origins = map(_origin, reports)
    rows = (
        f"| {each.scenario} | {each.policy} | {each.rule} | {each.median:g}x "
        f"| {', '.join(f'{value:.3f}' for value in each.each)} | {_bound(each)} | {_perfect(each)} |\n"
        for each in figures_of(reports)
    )
    return f"{ABOUT}\n{''.join(origins)}\n{HEAD}{''.join(rows)}"


def _origin(report: Mapping[str, Any]) -> str:
    revision = report["versions"]["git"]["revision"][:8]
    return f"- revision {revision}; command: `{_command(report)}`; date: {report['date']}\n"


def _command(report: Mapping[str, Any]) -> str:
    """Return the command without the places of this machine: a run's policy is RUN/hf, a file has its name alone."""
    words = shlex.split(report["command"])
    return shlex.join(_named(word) if word.startswith("/") else word for word in words)


def _named(path: str) -> str:
    name = path.rpartition("/")[2]
    return "RUN/hf" if name == "hf" else name


def _bound(figure: Figure) -> str:
    return "" if figure.bound is None else f">= {figure.bound:g}: {'holds' if figure.holds else 'misses'}"


def _perfect(figure: Figure) -> str:
    return "" if figure.perfect is None else f"{figure.perfect:g}x"


def with_block(document: str, made: str) -> str:
    before, _, rest = document.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"docs/measurements.md has no {BEGIN!r} and {END!r}"
    return f"{before}{BEGIN}{made}{END}{after}"


def read_figures(document: str) -> list[Figure]:
    """Return the figures of the document's table."""
    _, found, rest = document.partition(BEGIN)
    assert found, f"docs/measurements.md has no {BEGIN!r}"
    table = rest.partition(END)[0].partition(HEAD)[2]
    figures = []
    for line in table.splitlines():
        cells = (cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|"))
        scenario, policy, rule, median, each, bound, perfect = cells
        values = tuple(float(value) for value in each.split(", "))
        least = float(bound.removeprefix(">= ").partition(":")[0]) if bound else None
        ceiling = float(perfect.rstrip("x")) if perfect else None
        figures.append(Figure(scenario, policy, rule, float(median.rstrip("x")), values, least, ceiling))
    return figures


def picture(document: str) -> str:
    """Draw the figures of the document's table, as SVG."""
    figures = read_figures(document)
    shown = ((each.median, *each.each, each.bound or 1.0, each.perfect or 1.0) for each in figures)
    axis = Axis.around([value for each in shown for value in each])
    by_place = {(each.scenario, each.policy): each for each in figures}
    parts = [*_frame(axis), *_legend()]
    for column, (name, scenario) in enumerate(SCENARIOS.items()):
        parts += _labels(column, scenario)
        for side, policy in enumerate(POLICIES):
            x = _x(column, side)
            figure = by_place.get((name, policy))
            parts += [_absent(x, axis)] if figure is None else _drawn(figure, x, axis)
    return "\n".join([*parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Axis:
    """Maps a speed-up to a place in the picture, by its logarithm: half as fast is as far from 1 as twice as fast."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float]) -> Axis:
        return cls(min(0.9, *values) / 1.04, max(2.0, *values) * 1.12)

    def y(self, speedup: float) -> float:
        return HEIGHT - BOTTOM - log(speedup / self.low) / log(self.high / self.low) * (HEIGHT - BOTTOM - TOP)


def _x(column: int, side: int) -> float:
    width = (WIDTH - LEFT - RIGHT) / len(SCENARIOS)
    return LEFT + width * (column + (0.27, 0.73)[side])


def _frame(axis: Axis) -> Iterator[str]:
    right, even, floor = WIDTH - RIGHT, axis.y(1.0), HEIGHT - BOTTOM
    font = 'font-family="sans-serif" font-size="13"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>'
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    yield f'<rect x="{LEFT}" y="{even:.1f}" width="{right - LEFT}" height="{floor - even:.1f}" fill="#fdf1ec"/>'
    title = "What speculation pays: automatic depth over no speculation, on a CPU core"
    yield f'<text x="{LEFT}" y="24" font-size="16" font-weight="bold">{title}</text>'
    about = "SmolLM2-135M, embedded engine, EAGLE-3, temperature 1, tokens per CPU second, prefill included."
    yield f'<text x="{LEFT}" y="44" fill="#555555">{about}</text>'
    for value in (each for each in TICKS if axis.low <= each <= axis.high):
        y, colour = axis.y(value), "#111111" if value == 1 else "#dddddd"
        yield f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}x</text>'
    note = "Source: docs/measurements.md. Numbers are medians; the axis is logarithmic."
    yield f'<text x="{LEFT}" y="{HEIGHT - 10}" font-size="11" fill="#555555">{note}</text>'


def _legend() -> Iterator[str]:
    y, x = 65, float(LEFT)
    for policy, words in POLICIES.items():
        colour = COLOURS[policy]
        yield f'<line x1="{x:g}" x2="{x + 22:g}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="4"/>'
        yield f'<text x="{x + 28:g}" y="{y + 4}">{words}</text>'
        x += 126
    yield f'<circle cx="{x + 4:g}" cy="{y}" r="4" fill="#555555" fill-opacity="0.55"/>'
    yield f'<text x="{x + 14:g}" y="{y + 4}">a repetition</text>'
    x += 102
    yield f'<path d="{_mark(x + 11, y)}" fill="none" stroke="#111111" stroke-width="1.5"/>'
    yield f'<text x="{x + 32:g}" y="{y + 4}">its bound</text>'
    yield f'<text x="{x + 98:g}" y="{y + 4}" fill="{MISSES}" font-weight="bold">a median that misses it</text>'
    x += 268
    yield f'<path d="{_ceiling(x + 11, y)}" stroke="#111111" stroke-dasharray="3 2"/>'
    yield f'<text x="{x + 32:g}" y="{y + 4}">perfect drafts, free</text>'


def _mark(x: float, y: float) -> str:
    """Return the path of a bound: a line with its ends turned up, for what must lie above it."""
    return f"M{x - 15:.1f},{y - 5:.1f} v5 h30 v-5"


def _ceiling(x: float, y: float) -> str:
    """Return the path of what no draft can exceed."""
    return f"M{x - 15:.1f},{y:.1f} h30"


def _labels(column: int, scenario: Scenario) -> Iterator[str]:
    x, floor = (_x(column, 0) + _x(column, 1)) / 2, HEIGHT - BOTTOM
    name = NAMES.get(scenario.name, f"{scenario.num_at_once} at once")
    yield f'<text x="{x:.1f}" y="{floor + 20}" text-anchor="middle">{name}</text>'
    bounds = f"bounds {scenario.untrained:g}, {scenario.trained:g}"
    yield f'<text x="{x:.1f}" y="{floor + 38}" text-anchor="middle" font-size="11" fill="#555555">{bounds}</text>'


def _absent(x: float, axis: Axis) -> str:
    place = f'x="{x:.1f}" y="{axis.y(1.0) - 8:.1f}" transform="rotate(-90 {x + 4:.1f} {axis.y(1.0) - 8:.1f})"'
    return f'<text {place} font-size="11" fill="#555555">not measured</text>'


def _drawn(figure: Figure, x: float, axis: Axis) -> Iterator[str]:
    """Draw the repetitions side by side, the median across them with its number above, and the bound."""
    colour, spread = COLOURS[figure.policy], 24 / max(1, len(figure.each) - 1)
    for index, value in enumerate(figure.each):
        place = f'cx="{x + (index - (len(figure.each) - 1) / 2) * spread:.1f}" cy="{axis.y(value):.2f}"'
        yield f'<circle {place} r="4" fill="{colour}" fill-opacity="0.55"/>'
    y = axis.y(figure.median)
    yield f'<line x1="{x - 20:.1f}" x2="{x + 20:.1f}" y1="{y:.2f}" y2="{y:.2f}" stroke="{colour}" stroke-width="4"/>'
    base = min(axis.y(value) for value in (*figure.each, figure.median)) - 9
    if figure.perfect is not None:
        yield f'<path d="{_ceiling(x, axis.y(figure.perfect))}" stroke="#111111" stroke-dasharray="3 2"/>'
    if figure.bound is not None:
        bound_y = axis.y(figure.bound)
        yield f'<path d="{_mark(x, bound_y)}" fill="none" stroke="#111111" stroke-width="1.5"/>'
        if base - LABEL_HEIGHT < bound_y and bound_y - 5 < base + 4:  # the mark would cross the number
            base = bound_y - 5 - 6
    label_colour = colour if figure.holds else MISSES
    for style in ('fill="#ffffff" stroke="#ffffff" stroke-width="4" paint-order="stroke"', f'fill="{label_colour}"'):
        yield (
            f'<text x="{x:.1f}" y="{base:.1f}" text-anchor="middle" font-weight="bold" {style}>'
            f"{figure.median:.2f}x</text>"
        )


def main(files: Sequence[str]) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    if files:
        reports = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
        document = with_block(document, block(reports))
        DOCUMENT.write_text(document, encoding="utf-8")
    PICTURE.write_text(picture(document), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
