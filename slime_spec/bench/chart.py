"""Draw panels of lines as SVG: speed-up over batch size with a rule at 1, below which speculation loses, and others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from xml.sax.saxutils import escape

PLOT, HEIGHT = 430, 420
LEFT, LEAST_RIGHT, TOP, BOTTOM = 60, 230, 40, 50
FONT = 'font-family="sans-serif" font-size="12"'
LETTER = 6.6  # pixels of a letter of that size, for the width of a legend
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#8d6e63", "#555555")
RULE = "#000000"


@dataclass(frozen=True)
class Series:
    """Holds a line of (x, value) points; ``dashed`` marks predicted, not measured points, ``colour`` is chosen if None.

    ``ranges`` are the (least, greatest) value that each point stands for, empty where that is not known.
    """

    name: str
    points: tuple[tuple[int, float], ...]
    dashed: bool = False
    ranges: tuple[tuple[float, float], ...] = ()
    colour: str | None = None

    @property
    def highest(self) -> float:
        return max([value for _, value in self.points] + [high for _, high in self.ranges])


@dataclass(frozen=True)
class Panel:
    """Holds the lines of one picture: ``doubles`` says that the axis of x is logarithmic, ``rule`` is a black line.

    Values go from 0 to ``top`` in ``step``, each shown as ``value_format`` says.
    Example: ``Panel("acceptance", lines, "draft position", top=1.0, step=0.2, value_format="{:.0%}", doubles=False)``
    """

    title: str
    series: tuple[Series, ...]
    x_label: str
    top: float
    step: float = 1.0
    value_format: str = "{:.0f}x"
    rule: float | None = None
    doubles: bool = True


def speed_up_panel(title: str, series: Sequence[Series]) -> Panel:
    """Return the panel of speed-ups over batch sizes."""
    top = max(2, ceil(max(line.highest for line in series)))
    return Panel(title, tuple(series), "sequences decoded at once", top, rule=1.0)


def write_chart(path: Path, title: str, series: Sequence[Series]) -> None:
    """Draw ``series`` with a logarithmic batch axis."""
    write_panels(path, [speed_up_panel(title, series)])


def write_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw the panels below each other."""
    longest = max(len(line.name) for panel in panels for line in panel.series)
    width, height = LEFT + PLOT + max(LEAST_RIGHT, ceil(44 + LETTER * longest)), HEIGHT * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {FONT}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _drawn(panel, HEIGHT * number)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Frame:
    """Maps (x, value) to a place in the picture; ``first`` to ``last`` are the ends of the axis of x."""

    first: float
    last: float
    top: float
    offset: int
    doubles: bool

    def x(self, size: int) -> float:
        low, high, at = (log2(each) if self.doubles else float(each) for each in (self.first, self.last, size))
        return LEFT + (at - low) / max(1.0, high - low) * PLOT

    def y(self, value: float) -> float:
        return self.offset + HEIGHT - BOTTOM - value / self.top * (HEIGHT - BOTTOM - TOP)


def _drawn(panel: Panel, offset: int) -> Iterator[str]:
    sizes = sorted({size for line in panel.series for size, _ in line.points})
    frame = _Frame(1.0, sizes[-1], panel.top, offset, panel.doubles)
    yield f'<text x="{LEFT}" y="{offset + 22}" font-size="14">{escape(panel.title)}</text>'
    for number in range(round(panel.top / panel.step) + 1):
        value = number * panel.step
        yield _level(frame, value, RULE if value == panel.rule else "#dddddd")
        text = panel.value_format.format(value)
        yield f'<text x="{LEFT - 8}" y="{frame.y(value) + 4:.1f}" text-anchor="end">{text}</text>'
    floor = offset + HEIGHT - BOTTOM
    for size in sizes:
        yield f'<text x="{frame.x(size):.1f}" y="{floor + 18}" text-anchor="middle">{size}</text>'
    middle = LEFT + PLOT / 2
    yield f'<text x="{middle:.0f}" y="{floor + 38}" text-anchor="middle">{escape(panel.x_label)}</text>'
    for index, line in enumerate(panel.series):
        yield from _line(frame, line, line.colour or COLOURS[index % len(COLOURS)], offset + TOP + 18 * index)


def _level(frame: _Frame, value: float, colour: str) -> str:
    y = frame.y(value)
    return f'<line x1="{LEFT}" x2="{LEFT + PLOT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>'


def _line(frame: _Frame, line: Series, colour: str, legend_y: int) -> Iterator[str]:
    places = [(frame.x(size), frame.y(value)) for size, value in line.points]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    stroke = f'stroke="{colour}" stroke-width="2"' + (' stroke-dasharray="5 4"' if line.dashed else "")
    for (x, _), (low, high) in zip(places, line.ranges, strict=False):
        ends = f'y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"'
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{colour}" stroke-width="6" stroke-opacity="0.35"/>'
    yield f'<polyline points="{points}" fill="none" {stroke}/>'
    for x, y in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    x = LEFT + PLOT + 14
    yield f'<line x1="{x}" x2="{x + 24}" y1="{legend_y}" y2="{legend_y}" {stroke}/>'
    yield f'<text x="{x + 30}" y="{legend_y + 4}">{escape(line.name)}</text>'
