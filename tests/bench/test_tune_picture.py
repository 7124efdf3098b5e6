"""The picture of ``slime-spec tune``: each point, each range and the bar stand where the numbers are."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from slime_spec.bench.chart import BOTTOM, HEIGHT, RULE, TOP, Panel, Series, write_panels
from slime_spec.bench.tune.acceptance import Acceptance
from slime_spec.bench.tune.picture import BAR_NAME, acceptance_lines, speed_up_lines, write_picture
from slime_spec.bench.tune.report import Found
from slime_spec.bench.tune.results import Swept
from slime_spec.bench.tune.verdict import overall, verdict_of
from tests.bench.test_tune import made_up

SVG = "{http://www.w3.org/2000/svg}"
BATCHES = (made_up(1, auto=(1.4, 1.5, 1.8), fixed3=(1.2, 1.2)), made_up(8, auto=(0.9, 0.8)))
ACCEPTANCE = (
    Acceptance("EAGLE3 d", "block", (0.9, 0.5), (10, 9), 1.35, 2.0),
    Acceptance("NGRAM", "", (), (), None, None),
)


def level(value: float, top: float, panel: int = 0) -> float:
    """Where a value of a panel stands, by the frame's sizes."""
    return panel * HEIGHT + HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP)


def points_of(line: ElementTree.Element) -> list[tuple[float, ...]]:
    return [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]


def test_every_side_is_a_line_over_its_batches_with_its_range_beside_none_at_1() -> None:
    none, auto, fixed = speed_up_lines(BATCHES)
    assert none.points == ((1, 1.0), (8, 1.0))
    assert auto.points == ((1, 1.5), (8, pytest.approx(0.85)))
    assert auto.ranges == ((1.4, 1.8), (0.8, 0.9))
    assert (fixed.name, fixed.points) == ("fixed3", ((1, 1.2),))


def test_acceptance_is_cumulative_beside_the_bar_and_absent_where_positions_are_unknown() -> None:
    bar, draft = acceptance_lines(ACCEPTANCE)
    assert (bar.name, bar.points) == (BAR_NAME, ((1, 0.8), (2, 0.6), (3, 0.4)))
    assert (draft.name, draft.points) == ("EAGLE3 d, block", ((1, 0.9), (2, pytest.approx(0.45))))


def test_the_file_has_both_panels_with_everything_at_its_place(tmp_path: Path) -> None:
    swept = Swept(ACCEPTANCE, BATCHES, "measured costs")
    found = Found("CPU second", "8 replies", swept, tuple(map(verdict_of, BATCHES)), overall(BATCHES), None)
    write_picture(tmp_path / "tune.svg", found)
    root = ElementTree.parse(tmp_path / "tune.svg").getroot()
    none, auto, _, bar, draft = (points_of(line) for line in root.findall(f"{SVG}polyline"))
    assert [y for _, y in none] == [pytest.approx(level(1.0, 2.0), abs=0.1)] * 2
    assert [y for _, y in auto] == pytest.approx([level(1.5, 2.0), level(0.85, 2.0)], abs=0.1)
    assert [y for _, y in bar] == pytest.approx([level(each, 1.0, panel=1) for each in (0.8, 0.6, 0.4)], abs=0.1)
    assert [y for _, y in draft] == pytest.approx([level(0.9, 1.0, panel=1), level(0.45, 1.0, panel=1)], abs=0.1)
    assert [x for x, _ in bar][:2] == [x for x, _ in draft], "the same positions"
    ranges = [line.attrib for line in root.findall(f"{SVG}line") if line.attrib.get("stroke-opacity")]
    first = next(each for each in ranges if each["x1"] == f"{auto[0][0]:.1f}")
    assert (float(first["y1"]), float(first["y2"])) == pytest.approx((level(1.4, 2.0), level(1.8, 2.0)), abs=0.1)
    texts = {text.text for text in root.findall(f"{SVG}text")}
    assert {"none", "auto", "fixed3", BAR_NAME, "EAGLE3 d, block", "80%", "2x", "draft position"} <= texts
    assert "NGRAM" not in texts


def test_a_long_name_has_room_beside_the_plot(tmp_path: Path) -> None:
    widths = []
    for name in ("short", "EAGLE3 builtin:smollm2-135m-eagle3, 3 drafts, target_only"):
        write_panels(tmp_path / "x.svg", [Panel("title", (Series(name, ((1, 1.0),)),), "x", top=2.0, rule=1.0)])
        root = ElementTree.parse(tmp_path / "x.svg").getroot()
        widths.append(float(root.attrib["viewBox"].split()[2]))
        legend = next(text for text in root.findall(f"{SVG}text") if text.text == name)
        assert float(legend.attrib["x"]) + 6 * len(name) < widths[-1]
        assert [line for line in root.findall(f"{SVG}line") if line.attrib["stroke"] == RULE]
    assert widths[0] < widths[1]
