"""Draw docs/speedup.svg from the tables of docs/measurements.md: ``python scripts/make_speedup_picture.py``.

No number is written in this script: each point names the table, the row and the column that it is read from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
SOURCE, PICTURE = DOCS / "measurements.md", DOCS / "speedup.svg"

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 270, 64, 66
LABEL_STEP = 17  # least distance of two labels, pixels
WINS, LOSES = "#1b6ca8", "#c2410c"


@dataclass(frozen=True)
class Cell:
    """One number of a table: the table after ``heading`` whose first column is ``table``, by row and column."""

    heading: str
    table: str
    row: str
    column: str

    def read(self, document: str) -> float:
        _, found, rest = document.partition(f"\n{self.heading}\n")
        assert found, f"docs/measurements.md has no line {self.heading!r}"
        for rows in _tables(rest):
            names = list(rows[0])
            if names[0] != self.table or self.column not in names:
                continue
            for row in rows[1:]:
                if row[0] == self.row:
                    return float(row[names.index(self.column)].rstrip("x"))
        raise AssertionError(f"docs/measurements.md has no {self}")


@dataclass(frozen=True)
class Line:
    """A labelled line; ``points`` give, for each number of sequences decoded at once, the cell of its speed-up."""

    label: str
    points: Mapping[int, Cell]


EAGLE3 = "### EAGLE-3 over plain decoding, greedy, in domain"
LOOKUP = "### Lookup"
IN_RUN = "## Where lookup pays in this job"
BLOCK = "block verification"
LINES = (
    Line("EAGLE-3, greedy", {n: Cell(EAGLE3, "dtype, batch", f"bf16, {n}", "decode, CPU") for n in (1, 4, 8)}),
    Line(
        "EAGLE-3, temperature 1",
        {n: Cell(EAGLE3, "verification", BLOCK, f"batch {n}: over plain, CPU") for n in (1, 8)},
    ),
    Line("LOOKUP, replies that copy", {n: Cell(LOOKUP, "prompts", "copy", f"LOOKUP batch {n}") for n in (1, 8)}),
    Line("NGRAM, chat", {n: Cell(LOOKUP, "prompts", "chat", f"NGRAM batch {n}") for n in (1, 8)}),
    Line("LOOKUP in the main job", {n: Cell(IN_RUN, "sequences at once", str(n), "ratio") for n in (8, 64)}),
)


def picture(document: str) -> str:
    """Draw the picture of LINES, as SVG."""
    lines = [(line.label, {size: cell.read(document) for size, cell in line.points.items()}) for line in LINES]
    sizes = [1, 2, 4, 8, 16, 32, 64]
    top = ceil(max(value for _, points in lines for value in points.values()))
    return "\n".join([*_frame(sizes, top), *_drawn(lines, top), "</svg>"]) + "\n"


def _tables(text: str) -> Iterator[list[list[str]]]:
    """Return every markdown table of ``text`` as rows of cells, the rule below the head left out."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            yield [rows[0], *rows[2:]]
            rows = []


def _x(size: int) -> float:
    return LEFT + log2(size) / 6 * (WIDTH - RIGHT - LEFT)


def _y(value: float, top: int) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)


def _frame(sizes: Sequence[int], top: int) -> Iterator[str]:
    right, even, floor = WIDTH - RIGHT, _y(1, top), HEIGHT - BOTTOM
    font = 'font-family="sans-serif" font-size="13"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>'
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    yield f'<rect x="{LEFT}" y="{even:.1f}" width="{right - LEFT}" height="{floor - even:.1f}" fill="#fdf1ec"/>'
    title = "Speculation over plain decoding, on two CPU cores"
    yield f'<text x="{LEFT}" y="24" font-size="16" font-weight="bold">{title}</text>'
    about = "SmolLM2-135M, embedded engine. Above 1x speculation wins, below it loses."
    yield f'<text x="{LEFT}" y="44" fill="#555555">{about}</text>'
    for value in range(top + 1):
        y, colour = _y(value, top), "#111111" if value == 1 else "#dddddd"
        yield f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}x</text>'
    for size in sizes:
        yield f'<text x="{_x(size):.1f}" y="{floor + 18}" text-anchor="middle">{size}</text>'
    yield f'<text x="{(LEFT + right) / 2:.0f}" y="{floor + 38}" text-anchor="middle">sequences decoded at once</text>'
    note = (
        "Source: docs/measurements.md. Tokens per CPU second, bf16, EAGLE-3 without prefill; the main job: clock, fp32."
    )
    yield f'<text x="{LEFT}" y="{HEIGHT - 8}" font-size="11" fill="#555555">{note}</text>'


def _drawn(lines: Sequence[tuple[str, Mapping[int, float]]], top: int) -> Iterator[str]:
    """Draw lines with a value at each point, and a label beside each line's last point."""
    label_y: dict[float, float] = {}  # of the last label at a place on the batch axis
    for label, points in sorted(lines, key=lambda line: -line[1][max(line[1])]):
        places = [(_x(size), _y(value, top)) for size, value in points.items()]
        colour = WINS if points[max(points)] >= 1 else LOSES
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for x, y in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" stroke="#ffffff"/>'
        x, y = places[-1]
        beside = _y(1, top) + LABEL_STEP if abs(y - _y(1, top)) < LABEL_STEP else y + 4  # clear of the rule at 1
        label_y[x] = max(beside, label_y.get(x, 0.0) + LABEL_STEP)
        halo = 'stroke="#ffffff" stroke-width="4" paint-order="stroke"'
        for style in (f'fill="#ffffff" {halo}', f'fill="{colour}"'):
            yield f'<text x="{x + 10:.1f}" y="{label_y[x]:.1f}" {style}>{label} {points[max(points)]:g}x</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
