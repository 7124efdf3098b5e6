"""The benchmark of the coordinator: its rows, and how growth is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_spec.bench import coordinator as module
from slime_spec.bench.coordinator import (
    FAKES,
    ONE_AT_A_TIME,
    OURS,
    SHARING,
    TOGETHER,
    CoordinatorSizes,
    Side,
    growth_exponent,
    measure_coordinator,
)
from slime_spec.launch.cli import main

SMALL = CoordinatorSizes(num_engines=(2, 8), groups_per_engine=3, samples_per_group=4, samples_per_engine=6)


def test_every_number_of_engines_has_its_rows_with_each_round_and_the_largest_has_the_bound() -> None:
    rows = {row.id: row for row in measure_coordinator(SMALL, num_rounds=2)}
    of_sizes = [
        f"coordinator.{who}.{wait}.{n}" for who in (OURS, SHARING, FAKES) for wait in ("one", "many") for n in (2, 8)
    ]
    assert list(rows) == [*of_sizes, "coordinator.growth.one", "coordinator.growth.many"]
    assert [id for id, row in rows.items() if row.reach == "<= 100"] == [
        "coordinator.driver.one.8",
        "coordinator.driver.many.8",
        "coordinator.sharing.one.8",
        "coordinator.sharing.many.8",
    ]
    for id in of_sizes:
        assert rows[id].value > 0
        assert len(rows[id].what.partition("rounds ")[2].split()) == 2


@pytest.mark.parametrize("wait", [ONE_AT_A_TIME, TOGETHER])
@pytest.mark.parametrize("whose", [OURS, SHARING, FAKES])
def test_a_side_gives_every_sample_out(wait: str, whose: str) -> None:
    side = Side(SMALL, 8, wait, whose)
    side.prepare()
    assert side.run(0) == SMALL.num_samples(8) == 96
    assert bool(side.calls.shared) == (whose == SHARING)


def test_growth_is_the_power_of_what_grows() -> None:
    sizes = [16.0, 64.0, 256.0, 1024.0]
    assert growth_exponent(sizes, [3 * size for size in sizes]) == pytest.approx(1.0)
    assert growth_exponent(sizes, [0.1 * size**2 for size in sizes]) == pytest.approx(2.0)


def test_the_command_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CoordinatorSizes", lambda: SMALL)
    code = main(["bench", "coordinator", "--rounds", "1", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert code == int(any(row["holds"] is False for row in rows))
    assert {row["unit"] for row in rows} == {"us", "power"}
