"""Draw speed-up over batch size as SVG: one line per series, and a rule at 1, below which speculation loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 230, 40, 50
FONT = 'font-family="sans-serif" font-size="12"'
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#8d6e63", "#555555")


@dataclass(frozen=True)
class Series:
    """Holds a line of (batch size, speed-up) points; ``dashed`` marks predicted, not measured points."""

    name: str
    points: tuple[tuple[int, float], ...]
    dashed: bool = False


def write_chart(path: Path, title: str, series: Sequence[Series]) -> None:
    """Draw ``series`` with a logarithmic batch axis."""
    sizes = sorted({size for line in series for size, _ in line.points})
    top = max(2, ceil(max(value for line in series for _, value in line.points)))
    frame = _Frame(max(1.0, log2(sizes[-1])), top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for value in range(top + 1):
        y = frame.y(value)
        colour = "#000000" if value == 1 else "#dddddd"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}x</text>')
    for size in sizes:
        parts.append(f'<text x="{frame.x(size):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{size}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 12}" text-anchor="middle">sequences decoded at once</text>')
    for index, line in enumerate(series):
        parts += _line(frame, line, COLOURS[index % len(COLOURS)], TOP + 18 * index)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


@dataclass(frozen=True)
class _Frame:
    """Maps (batch size, speed-up) to a place in the picture."""

    octaves: float
    top: int

    def x(self, size: int) -> float:
        return LEFT + log2(size) / self.octaves * (WIDTH - RIGHT - LEFT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.top * (HEIGHT - BOTTOM - TOP)


def _line(frame: _Frame, line: Series, colour: str, legend_y: int) -> list[str]:
    points = " ".join(f"{frame.x(size):.1f},{frame.y(value):.1f}" for size, value in line.points)
    stroke = f'stroke="{colour}" stroke-width="2"' + (' stroke-dasharray="5 4"' if line.dashed else "")
    x = WIDTH - RIGHT + 14
    return [
        f'<polyline points="{points}" fill="none" {stroke}/>',
        f'<line x1="{x}" x2="{x + 24}" y1="{legend_y}" y2="{legend_y}" {stroke}/>',
        f'<text x="{x + 30}" y="{legend_y + 4}">{escape(line.name)}</text>',
    ]
