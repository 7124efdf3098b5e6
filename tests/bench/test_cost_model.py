"""The cost model against costs that follow it exactly, and the chart that is drawn from it."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from slime_spec.bench.chart import Series, write_chart
from slime_spec.bench.cost_model import CostModel, Line, Pass, fit

TRUE = CostModel(0.010, 0.0005, 0.001, Line(0.0008, 0.0001), Line(0.0006, 0.0002), Line(0.0004, 0.0001))
SIZES = (1, 2, 4, 8)


def test_a_fit_finds_the_coefficients_that_made_the_measurements() -> None:
    passes = [Pass(size, count, TRUE.verify_s(size, count)) for size in SIZES for count in (1, 2, 4)]
    drafts = [Pass(size, steps, steps * TRUE.draft_step.at(size)) for size in SIZES for steps in (2, 5)]
    outside = [Pass(size, 1, TRUE.outside.at(size)) for size in SIZES]
    plain = [Pass(size, 1, TRUE.plain_outside.at(size)) for size in SIZES]
    found = fit(passes, drafts, outside, plain)
    for name in ("weights", "sequence", "token"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name))
    for name in ("draft_step", "outside", "plain_outside"):
        line, expected = getattr(found, name), getattr(TRUE, name)
        assert (line.fixed, line.each) == pytest.approx((expected.fixed, expected.each))
    assert found.verify_error == pytest.approx(0.0, abs=1e-9)


def test_no_cost_is_negative_and_the_error_says_how_far_off_the_fit_is() -> None:
    # Falling with the batch size: the best fit without negative costs is a constant, 1.5 times off at one end.
    found = fit([Pass(1, 1, 0.020), Pass(2, 1, 0.015), Pass(8, 1, 0.010)])
    assert found.weights > 0
    assert (found.sequence, found.token) == (0.0, 0.0)
    assert 0.1 < found.verify_error < 0.5


def test_a_round_breaks_even_where_it_costs_as_many_plain_steps_as_it_gains_tokens() -> None:
    # batch 4, 3 drafts: (10 + 4 (0.5 + 4) + 3 (0.8 + 0.4) + 1.4) / (10 + 4 (0.5 + 1) + 0.8) ms
    assert TRUE.break_even_length(4, 3) == pytest.approx((10 + 18 + 3.6 + 1.4) / (10 + 6 + 0.8))
    assert TRUE.speed_up(4, 3, 2.0) == pytest.approx(2.0 * 16.8 / 33.0)


def test_speculation_loses_from_the_first_batch_that_is_slower_than_plain_decoding() -> None:
    size = TRUE.loses_from(3, 2.0, 32)
    assert size is not None
    assert TRUE.speed_up(size, 3, 2.0) < 1.0 <= TRUE.speed_up(size - 1, 3, 2.0)
    assert TRUE.loses_from(3, 1.0, 32) == 1
    assert TRUE.loses_from(3, 4.0, 8) is None


def test_a_chart_has_a_line_per_series_in_the_frame_and_the_losing_rule(tmp_path: Path) -> None:
    lines = [Series("short & quick", ((1, 2.1), (2, 1.5), (8, 0.9))), Series("long", ((1, 2.6), (8, 0.5)), dashed=True)]
    write_chart(tmp_path / "chart.svg", "speed-up", lines)
    root = ElementTree.parse(tmp_path / "chart.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    drawn = [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in root.findall(f"{name}polyline")
    ]
    assert [len(points) for points in drawn] == [3, 2]
    (_, high), (_, middle), (_, low) = drawn[0]
    assert high < middle < low  # more is further up
    rule = next(line for line in root.findall(f"{name}line") if line.attrib["stroke"] == "#000000")
    assert middle < float(rule.attrib["y1"]) < low  # 1.5x is above it, 0.9x below
    assert {text.text for text in root.findall(f"{name}text")} >= {"short & quick", "long", "8"}
