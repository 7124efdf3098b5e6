"""Tables that a report makes of what benchmarks and tune have measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.report.measured import read_measured


def test_rows_of_a_benchmark_and_speed_ups_of_tune_become_tables(tmp_path: Path) -> None:
    bench = tmp_path / "bench.json"
    figure = {"id": "push.ratio", "what": "push / copy", "value": 2.0831, "unit": "x", "reach": "<= 3", "holds": True}
    bench.write_text(json.dumps({"rows": [figure, {**figure, "value": None, "holds": None}], "date": "2026-01-01"}))
    table = read_measured(bench)
    assert table.rows == (
        ("push.ratio", "push / copy", "2.083 x", "<= 3", "yes"),
        ("push.ratio", "push / copy", "not measured", "<= 3", ""),
    )
    assert table.about == ("date: 2026-01-01",)
    tune = tmp_path / "tune.json"
    batch = {
        "batch": 8,
        "off_tokens_per_s": 500.0,
        "speed_ups": {"eagle": {"median": 1.25, "each": [1.25], "depth": 3}},
    }
    verdict = {"batch": 8, "side": "eagle", "flags": ["--speculative-num-steps", "3"], "why": ""}
    tune.write_text(json.dumps({"batches": [batch], "verdicts": [verdict]}))
    assert read_measured(tune).head == ("sequences at once", "plain tokens/s", "eagle", "choice", "flags")
    assert read_measured(tune).rows == (("8", "500", "1.25 x", "eagle", "--speculative-num-steps 3"),)
    (tmp_path / "other.json").write_text('{"batches": 3, "verdicts": []}')
    with pytest.raises(ConfigError, match="must be what slime-spec bench"):
        read_measured(tmp_path / "other.json")
