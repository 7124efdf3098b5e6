"""What engines say of themselves becomes metrics: pooled, over the step, and absent where nobody measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slime_spec.metrics.engines import benefit_metrics, canary_metrics, engine_metrics
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import EngineStats, SpecCounters

IDLE = EngineStats(0, 0, 0, 0, 100, True, 0)


def counted(num_rounds: int, num_correct: int) -> SpecCounters:
    return SpecCounters(num_rounds=num_rounds, num_correct_unbinned=num_correct)


def test_restarts_and_resent_drafts_are_summed_and_a_disabled_speculation_lowers_its_share() -> None:
    after = [
        replace(IDLE, speculates=True, num_restarts=2, num_preemptions=3, num_interruptions=4),
        replace(IDLE, speculates=False, num_restarts=1, num_draft_resends=1, num_interruptions=1),
    ]
    values = engine_metrics([IDLE, IDLE], after, speculates=True)
    assert values == {
        "engine/speculating": 0.5,
        "engine/restarts": 3.0,
        "engine/draft_resends": 1.0,
        "engine/interruptions": 5.0,
        "engine/preemptions": 3.0,
    }
    assert "engine/speculating" not in engine_metrics([IDLE, IDLE], after, speculates=False)


def test_shares_of_time_are_those_of_the_step_over_all_engines() -> None:
    before = [
        replace(IDLE, time_total_s=10.0, time_in_forward_s=9.0, time_in_draft_s=1.0),
        replace(IDLE, time_total_s=100.0, time_in_forward_s=100.0),
    ]
    after = [
        replace(IDLE, time_total_s=14.0, time_in_forward_s=11.0, time_in_draft_s=2.0),
        replace(IDLE, time_total_s=104.0, time_in_forward_s=102.0, time_in_draft_s=1.0),
    ]
    values = engine_metrics(before, after, speculates=False)
    assert (values["perf/engine_forward_share"], values["perf/engine_draft_share"]) == (0.5, 0.25)


def test_the_estimate_counts_whole_rollouts_of_all_engines_since_the_step_began() -> None:
    before = [replace(IDLE, benefit=NetBenefit(10.0, 8.0, 1.0, 6.0, 3.0)), IDLE]
    after = [
        replace(IDLE, benefit=NetBenefit(13.0, 14.0, 1.2, 8.0, 4.0), pays_up_to=6, draft_temperature=0.4),
        replace(IDLE, benefit=NetBenefit(1.0, 1.0, 0.0, 0.0, 0.0), pays_up_to=4, draft_temperature=0.8),
    ]
    assert benefit_metrics(before, after) == pytest.approx(
        {
            "spec/net_speedup_est": (6.0 + 1.0) / (3.0 + 1.0),
            "spec/net_speedup_err": 0.2 / 4.0,
            "spec/break_even_length": 2.0 / 1.0,
            "spec/pays_up_to_batch": 4.0,
            "spec/draft_temperature": 0.6,
        }
    )


def test_nothing_is_said_of_the_benefit_where_nothing_was_measured() -> None:
    assert benefit_metrics([IDLE], [IDLE]) == {}


def test_the_canary_is_pooled_over_the_engines_that_ran_one_and_the_lowest_is_told() -> None:
    stats = [replace(IDLE, canary=counted(30, 60)), replace(IDLE, canary=counted(10, 0)), IDLE]
    assert canary_metrics(stats) == {"sync/canary_accept_length": 2.5, "sync/canary_accept_length_min": 1.0}
    assert canary_metrics([IDLE]) == {}
