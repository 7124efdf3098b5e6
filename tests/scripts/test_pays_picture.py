"""The picture of what speculation pays shows every repetition, median and bound of the benchmark's JSON."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from slime_spec.bench.pays.scenarios import LONGEST_IN_JOB, scenarios
from slime_spec.bench.pays.verdict import Where, rows_of
from slime_spec.bench.rows import report_json
from tests.bench.test_bench_pays import BATCHES, result
from tests.scripts.test_generated_docs import script

SVG = "{http://www.w3.org/2000/svg}"
EMPTY = "# Measurements\n\n<!-- made by scripts/make_pays_picture.py -->\n<!-- end -->\n\nThe rest.\n"
# Scenario, policy -> CPU seconds of three repetitions without speculation over those with it.
PERFECT = 1.25  # over that, where drafts are right and cost nothing
SPEEDUPS = {
    ("64", "untrained"): (0.98, 0.97, 1.03),
    ("64", "trained"): (1.01, 1.04, 1.06),
    ("1", "untrained"): (1.5, 2.0, 2.5),
    ("1", "trained"): (2.8, 3.2, 4.0),
}


@pytest.fixture(scope="module")
def pays() -> ModuleType:
    return script("make_pays_picture")


def report(*places: tuple[str, str], rule: str = "target_only") -> dict[str, Any]:
    """What ``slime-spec bench pays --json`` writes of these scenarios and policies."""
    rows = []
    for scenario, policy in places:
        speedups = SPEEDUPS[scenario, policy]
        times = {name: [result(8.0) for _ in speedups] for name in ("off", "history")}
        times["perfect"] = [result(8.0 / each / PERFECT) for each in speedups]
        times |= {"auto": [result(8.0 / each) for each in speedups], "depth1": [result(9.0) for _ in speedups]}
        bound = getattr(scenarios(LONGEST_IN_JOB)[scenario], policy)
        rows += rows_of(Where(policy, scenario, rule), times, BATCHES, bound)
    command = ["slime-spec", "bench", "pays", "--policy", "/somewhere/run/hf", "--json", "/somewhere/else/a.json"]
    made: dict[str, Any] = json.loads(report_json(rows, command, [0]))
    made["versions"]["git"] = {"revision": "0123456789abcdef", "dirty": False}
    made["date"] = "2026-12-01T00:00:00+00:00"
    return made


def document(pays: ModuleType, *reports: dict[str, Any]) -> str:
    made: str = pays.with_block(EMPTY, pays.block(reports))
    return made


def speedup_at(drawn: str, y: float) -> float:
    """The speed-up at a height, by the axis's own labels: 1x and the highest one."""
    heights = {
        float(value): float(y) - 4 for y, value in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)x<', drawn)
    }
    high = max(heights)
    return math.exp((heights[1.0] - y) / (heights[1.0] - heights[high]) * math.log(high))


def test_every_repetition_is_a_dot_at_its_height_and_every_bound_a_mark(pays: ModuleType) -> None:
    drawn = pays.picture(document(pays, report(("64", "untrained"), ("1", "untrained")), report(("1", "trained"))))
    root = ElementTree.fromstring(drawn)
    dots = [each for each in root.iter(f"{SVG}circle")][1:]  # the first is the legend's
    found = sorted(speedup_at(drawn, float(dot.attrib["cy"])) for dot in dots)
    shown = [SPEEDUPS[place] for place in (("64", "untrained"), ("1", "untrained"), ("1", "trained"))]
    assert found == pytest.approx(sorted(value for each in shown for value in each), rel=2e-3)
    paths = [each.attrib for each in root.iter(f"{SVG}path")][2:]  # the first of each kind is the legend's
    marks = [each["d"] for each in paths if "stroke-dasharray" not in each]
    heights = [float(re.fullmatch(r"M[\d.]+,([\d.]+) v5 .*", mark)[1]) + 5 for mark in marks]  # type: ignore[index]
    assert [speedup_at(drawn, y) for y in heights] == pytest.approx([0.99, 1.8, 3.0], rel=2e-3)
    dashed = [re.fullmatch(r"M[\d.]+,([\d.]+) h30", each["d"]) for each in paths if "stroke-dasharray" in each]
    ceilings = [speedup_at(drawn, float(each[1])) for each in dashed if each]
    assert ceilings == pytest.approx([0.98 * PERFECT, 2.0 * PERFECT, 3.2 * PERFECT], rel=2e-3)


def test_a_median_is_told_by_number_and_one_that_misses_its_bound_in_another_colour(pays: ModuleType) -> None:
    drawn = pays.picture(document(pays, report(*SPEEDUPS)))
    numbers = re.findall(r'font-weight="bold" fill="(#\w+)">([\d.]+x)<', drawn)
    before, after = pays.COLOURS["untrained"], pays.COLOURS["trained"]
    assert numbers == [(pays.MISSES, "0.98x"), (after, "1.04x"), (before, "2.00x"), (after, "3.20x")]


def test_a_scenario_that_was_not_measured_is_said_to_be_so(pays: ModuleType) -> None:
    drawn = pays.picture(document(pays, report(("1", "trained"))))
    assert drawn.count("not measured") == 2 * len(pays.SCENARIOS) - 1


def test_the_table_has_the_numbers_of_the_reports_with_what_repeats_them_and_no_place_of_this_machine(
    pays: ModuleType,
) -> None:
    made = document(pays, report(("64", "trained"), rule="block"))
    assert "| 64 | trained | block | 1.04x | 1.010, 1.040, 1.060 | >= 1.02: holds | 1.3x |" in made
    assert "revision 01234567; command: `slime-spec bench pays --policy RUN/hf --json a.json`" in made
    assert made.startswith("# Measurements\n")
    assert made.endswith("The rest.\n")
    assert pays.read_figures(made) == pays.figures_of([report(("64", "trained"), rule="block")])


def test_other_numbers_take_the_place_of_those_that_were_there(pays: ModuleType) -> None:
    first = document(pays, report(*SPEEDUPS))
    assert pays.with_block(first, pays.block([report(("1", "trained"))])) == document(pays, report(("1", "trained")))


def test_a_scenario_given_twice_and_files_of_another_benchmark_are_refused(pays: ModuleType) -> None:
    with pytest.raises(ValueError, match="scenario 1 of the trained policy was measured twice"):
        pays.block([report(("1", "trained")), report(("1", "trained"), rule="block")])
    with pytest.raises(ValueError, match=r"no file has a row pays\.POLICY\.SCENARIO\.auto\.speedup"):
        pays.block([{**report(), "rows": []}])


def test_the_command_writes_the_table_and_the_picture_and_without_files_the_picture_alone(
    pays: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pays, "DOCUMENT", tmp_path / "measurements.md")
    monkeypatch.setattr(pays, "PICTURE", tmp_path / "pays.svg")
    pays.DOCUMENT.write_text(EMPTY)
    files = []
    for policy in ("untrained", "trained"):
        (tmp_path / f"{policy}.json").write_text(json.dumps(report(("1", policy), ("64", policy))))
        files.append(str(tmp_path / f"{policy}.json"))
    pays.main(files)
    first = pays.PICTURE.read_text()
    assert pays.picture(pays.DOCUMENT.read_text()) == first
    pays.PICTURE.unlink()
    pays.main([])
    assert pays.PICTURE.read_text() == first
