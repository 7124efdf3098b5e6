"""A draft that is never right is told of, once, with what it may come from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from slime_spec.algorithms import ALGORITHMS, find_algorithm
from slime_spec.config.tree import Config, MetricsConfig, SpeculativeConfig
from slime_spec.metrics.alarm import NONFINITE_ROUNDS, SILENT_ROUNDS, AcceptanceAlarm
from slime_spec.metrics.log import MetricLog


def step(rounds: int, empty: int = 0, correct: int = 0) -> dict[str, float]:
    return {"spec/verify_rounds": rounds, "spec/empty_rounds": empty, "spec/correct_drafts": correct}


def warned(caplog: pytest.LogCaptureFixture, *steps: dict[str, float], algorithm: str = "EAGLE3") -> list[str]:
    caplog.clear()
    alarm = AcceptanceAlarm(find_algorithm(algorithm))
    with caplog.at_level(logging.WARNING):
        for number, values in enumerate(steps):
            alarm.write(number, values)
    return [record.getMessage() for record in caplog.records]


def test_two_hundred_rounds_without_an_accepted_draft_are_told_with_the_likely_causes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (message,) = warned(caplog, step(SILENT_ROUNDS))
    assert "accept length is exactly 1.00" in message
    for cause in ("lm_head", "d2t", "layer ids", "earlier target"):
        assert cause in message
    assert "wrong order" in warned(caplog, step(SILENT_ROUNDS), algorithm="NEXTN")[0]


def test_it_is_told_once_a_run_and_counts_over_steps(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = warned(caplog, step(SILENT_ROUNDS - 1), step(1), step(500))
    assert "step=1" in message


@pytest.mark.parametrize(
    "steps",
    [
        [step(SILENT_ROUNDS - 1)],
        [step(10 * SILENT_ROUNDS, correct=1)],
        [step(SILENT_ROUNDS - 1), step(50, correct=1), step(SILENT_ROUNDS - 1)],
        [step(SILENT_ROUNDS, empty=1)],
        [{}, {}],
    ],
)
def test_fewer_rounds_an_accepted_draft_or_no_draft_at_all_are_no_alarm(
    caplog: pytest.LogCaptureFixture, steps: list[dict[str, float]]
) -> None:
    assert warned(caplog, *steps) == []


def test_a_draft_without_finite_logits_is_told_of_once_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    """Case audit/13: all its rounds are empty, so that the alarm of refused drafts says nothing."""
    overflowing = {**step(150, empty=150), "spec/nonfinite_rounds": 150}
    assert warned(caplog, overflowing) == []
    (message,) = warned(caplog, *[overflowing] * 4)
    assert f"not finite numbers: its drafts are cut short or empty, the output stays exact rounds={2 * 150}" in message
    assert "step=1 algorithm=EAGLE3" in message
    assert "--speculative-algorithm NONE" in message
    assert NONFINITE_ROUNDS <= 300


def test_every_algorithm_that_drafts_has_its_likely_causes() -> None:
    assert all(bool(each.likely_causes) == each.speculates for each in ALGORITHMS.values())


@pytest.mark.parametrize(("algorithm", "expected"), [("LOOKUP", 1), ("HISTORY", 1), ("NONE", 0)])
def test_a_runs_log_has_the_alarm_when_it_speculates(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, algorithm: str, expected: int
) -> None:
    config = Config(metrics=MetricsConfig(console=False), speculative=SpeculativeConfig(algorithm=algorithm))
    with caplog.at_level(logging.WARNING), MetricLog.open(config, tmp_path) as log:
        log.log(0, step(SILENT_ROUNDS))
    assert len([record for record in caplog.records if "accept length" in record.getMessage()]) == expected
