"""One table of metrics, and the document that is printed from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_spec.errors import ConfigError
from slime_spec.metrics.log import MetricLog
from slime_spec.metrics.null import NullSink
from slime_spec.metrics.table import TABLE, markdown, metric

DOC = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_document_is_what_the_script_writes() -> None:
    assert DOC.read_text(encoding="utf-8") == markdown(), "run: python scripts/make_metrics_doc.py"


def test_every_row_has_a_name_of_its_own_a_unit_and_a_meaning() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert all(row.unit and row.meaning.endswith(".") for row in TABLE)


def test_the_names_that_other_tools_expect_are_there() -> None:
    for name in (
        "rollout/spec_accept_rate",
        "rollout/spec_accept_length",
        "train/train_rollout_logprob_abs_diff",
        "train/grad_norm",
        "perf/rollout_time",
        "perf/train_time",
        "perf/sync_time",
        "sync/seconds",
        "sync/bytes",
        "sync/tensors",
        "sync/checksum_ok",
    ):
        assert metric(name).name == name


def test_a_templated_name_stands_for_every_position_and_task() -> None:
    assert metric("spec/accept_rate_pos_12").name == "spec/accept_rate_pos_{i}"
    assert metric("rollout/reward_mean/max4").name == "rollout/reward_mean/{task}"


@pytest.mark.parametrize("name", ["spec/accept_rate_pos_", "spec/accept_rate_pos_x", "rollout/reward_mean/a/b", "loss"])
def test_a_name_that_only_resembles_a_row_is_unknown(name: str) -> None:
    with pytest.raises(ConfigError):
        metric(name)


def test_logging_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'rollout/spec_accept_rate'"):
        MetricLog([NullSink()]).log(0, {"rollout/spec_acceptance_rate": 0.5})
