"""What a step's samples say: pooled ratios, positions, exclusions; every number worked out by hand in the test."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import sample

from slime_spec.metrics.engines import benefit_metrics, canary_metrics, engine_metrics
from slime_spec.metrics.evaluation import evaluation_metrics
from slime_spec.metrics.rollout import filter_metrics, rollout_metrics, sudden_drop_metrics
from slime_spec.metrics.step import draft_push_metrics, draft_update_metrics, perf_metrics, push_metrics, train_metrics
from slime_spec.metrics.table import TABLE, metric
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import DraftReport, EngineStats, Sample, SpecCounters, TisReport, TrainReport, TurnCounts
from slime_spec.weights.run import PushReport


def test_acceptance_is_pooled_over_requests_and_not_a_mean_of_their_ratios() -> None:
    # 1 round, 3 of 3 accepted; 9 rounds, none of 27 accepted: pooled 3/30, while the mean of ratios would say 1/2.
    both = [sample(length=5, histogram=(0, 0, 0, 1)), sample(length=10, histogram=(9,))]
    metrics = rollout_metrics(both)
    assert metrics["rollout/spec_accept_rate"] == 3 / 30
    assert metrics["rollout/spec_accept_length"] == 15 / 10


def test_what_was_really_drafted_is_told_apart_from_what_the_convention_counts() -> None:
    # 8 rounds of at most 3 drafts, 5 of them empty: 24 by convention, 9 drafted, 4 accepted.
    samples = [sample(histogram=(3, 1), num_empty_rounds=3), sample(histogram=(3, 0, 0, 1), num_empty_rounds=2)]
    metrics = rollout_metrics(samples)
    assert (metrics["spec/proposed_drafts"], metrics["spec/drafted_tokens"], metrics["spec/empty_rounds"]) == (24, 9, 5)
    assert metrics["rollout/spec_accept_rate"] == 4 / 24
    assert metrics["spec/accept_rate_drafted"] == 4 / 9
    nothing = rollout_metrics([sample(histogram=(4,), num_empty_rounds=4)])
    assert (nothing["rollout/spec_accept_rate"], nothing["spec/drafted_tokens"]) == (0.0, 0.0)
    assert "spec/accept_rate_drafted" not in nothing


def test_a_request_without_a_verify_round_counts_in_neither_sum() -> None:
    with_round = [sample(length=6, histogram=(1, 0, 2))]
    without = [sample(length=1, histogram=()) for _ in range(7)]
    alone, together = rollout_metrics(with_round), rollout_metrics(with_round + without)
    for name in ("rollout/spec_accept_rate", "rollout/spec_accept_length", "spec/accept_rate_pos_0"):
        assert together[name] == alone[name]
    assert alone["rollout/spec_accept_length"] == 2.0


def test_rates_by_position_come_from_the_histogram() -> None:
    # 10 rounds: 4 accepted none, 3 one, 1 two, 2 all three drafts.
    metrics = rollout_metrics([sample(histogram=(4, 2, 0, 2)), sample(histogram=(0, 1, 1))])
    assert [metrics[f"spec/accept_rate_cum_pos_{i}"] for i in range(3)] == [6 / 10, 3 / 10, 2 / 10]
    assert [metrics[f"spec/accept_rate_pos_{i}"] for i in range(3)] == [6 / 10, 3 / 6, 2 / 3]
    assert metrics["spec/verify_rounds"] == 10
    assert metrics["spec/correct_drafts"] == 4 * 0 + 3 * 1 + 1 * 2 + 2 * 3


def test_a_position_that_no_round_accepted_has_rate_zero_and_the_ones_behind_it_none() -> None:
    metrics = rollout_metrics([sample(histogram=(2, 3), num_drafts=3)])
    assert [metrics.get(f"spec/accept_rate_pos_{i}") for i in range(3)] == [3 / 5, 0.0, None]
    assert [metrics.get(f"spec/accept_rate_cum_pos_{i}") for i in range(3)] == [3 / 5, 0.0, None]


def test_a_request_whose_engine_has_no_histogram_does_not_lower_the_rates_by_position() -> None:
    counted = sample(histogram=(1, 1))
    uncounted = replace(counted, response=replace(counted.response, spec=SpecCounters(8, 24, ())))
    assert rollout_metrics([counted, uncounted])["spec/accept_rate_pos_0"] == 1 / 2


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6).map(tuple), min_size=1, max_size=5))
def test_a_cumulative_rate_is_the_product_of_the_conditional_ones(histograms: list[tuple[int, ...]]) -> None:
    metrics = rollout_metrics([sample(histogram=histogram, num_drafts=5) for histogram in histograms])
    product, mean_accepted = 1.0, 0.0
    for i in range(sum(name.startswith("spec/accept_rate_cum") for name in metrics)):
        product *= metrics[f"spec/accept_rate_pos_{i}"]
        assert metrics[f"spec/accept_rate_cum_pos_{i}"] == pytest.approx(product)
        mean_accepted += product
    if metrics["spec/verify_rounds"]:
        assert mean_accepted == pytest.approx(metrics["spec/correct_drafts"] / metrics["spec/verify_rounds"])


def test_without_speculation_acceptance_is_absent_rather_than_zero() -> None:
    metrics = rollout_metrics([sample(), sample()])
    assert metrics["spec/verify_rounds"] == 0
    assert not [name for name in metrics if "accept_" in name]


def test_rewards_count_scored_samples_only_and_exclusions_are_counted() -> None:
    metrics = rollout_metrics(
        [
            sample(prompt_id=0, reward=1.0, length=2, task="add10"),
            sample(prompt_id=0, reward=0.0, length=4, task="add10", finish_reason="length"),
            sample(prompt_id=1, reward=1.0, length=6, task="max4", version=2),
            sample(prompt_id=1, reward=None, length=8, task="max4", version=2),
        ]
    )
    assert metrics["rollout/reward_mean"] == 2 / 3
    assert metrics["rollout/reward_std"] == pytest.approx(math.sqrt(2 / 9))
    assert metrics["rollout/reward_mean/add10"] == 1 / 2
    assert metrics["rollout/reward_mean/max4"] == 1.0
    assert metrics["rollout/mixed_group_ratio"] == 1 / 2
    assert (metrics["rollout/num_samples"], metrics["rollout/num_excluded"]) == (4, 1)
    assert (metrics["rollout/response_len_mean"], metrics["rollout/response_len_max"]) == (5, 8)
    assert metrics["rollout/truncated_ratio"] == 1 / 4
    assert (metrics["rollout/weight_version_min"], metrics["rollout/weight_version_max"]) == (0, 2)


def test_a_step_whose_every_sample_is_excluded_has_no_reward_but_says_so() -> None:
    metrics = rollout_metrics([sample(reward=None)])
    assert metrics["rollout/num_excluded"] == 1
    assert "rollout/reward_mean" not in metrics
    assert rollout_metrics([]) == {"rollout/num_samples": 0.0}


def test_speeds_are_tokens_over_the_seconds_of_their_phase() -> None:
    samples = [sample(length=10, latency_s=1.0), sample(length=30, latency_s=3.0), sample(length=8, reward=None)]
    metrics = perf_metrics(samples, {"rollout": 4.0, "train": 2.0, "sync": 0.5}, 7.0)
    assert metrics["perf/tokens_per_s"] == 48 / 4
    assert metrics["perf/train_tokens_per_s"] == (5 + 10 + 5 + 30) / 2
    assert (metrics["perf/request_latency_mean"], metrics["perf/request_latency_max"]) == (4 / 3, 3.0)
    assert (metrics["perf/sync_time"], metrics["perf/step_time"]) == (0.5, 7.0)


def drafted_by(draft_version: int | None, histogram: tuple[int, ...] = (1,)) -> Sample:
    """A sample of weights 7."""
    given = sample(histogram=histogram, version=7)
    return replace(given, response=replace(given.response, draft_version=draft_version))


def said_by_engines() -> dict[str, float]:
    idle = EngineStats(0, 0, 0, 0, 100, True, 0)
    canary = SpecCounters(num_rounds=3, histogram=(1, 2))
    times = replace(
        idle,
        time_total_s=2.0,
        time_in_forward_s=1.0,
        benefit=NetBenefit(5.0, 7.0, 0.5, 3.0, 2.0),
        pays_up_to=6,
        draft_temperature=0.6,
    )
    worked = replace(times, canary=canary)
    return {
        **engine_metrics([idle], [worked], speculates=True),
        **benefit_metrics([idle], [worked]),
        **canary_metrics([worked]),
    }


def of_turns() -> Sample:
    """Two turns of 4 and 3 generated tokens with 2 of a tool between, of which the second turn had no verify round."""
    given = sample(length=9, histogram=(1, 1))
    turns = TurnCounts(2, num_generated_tokens=7, num_verified_tokens=4, num_prompt_tokens=5 + 11, outside_s=0.25)
    mask = (1, 1, 1, 1, 0, 0, 1, 1, 1)
    return replace(given, response=replace(given.response, loss_mask=mask, turns=turns, cached_tokens=4))


def test_a_sample_of_several_turns_counts_what_was_generated_and_verified() -> None:
    metrics = rollout_metrics([of_turns(), sample(length=5, histogram=())])
    assert (metrics["rollout/response_len_mean"], metrics["rollout/response_len_max"]) == ((7 + 5) / 2, 7)
    assert metrics["rollout/num_tokens"] == 7 + 5
    assert metrics["rollout/spec_accept_length"] == 4 / 2
    assert (metrics["rollout/turns_mean"], metrics["rollout/loss_token_share"]) == (2, 7 / 9)
    assert (metrics["rollout/cached_prompt_share"], metrics["rollout/outside_time_mean"]) == (4 / 16, 0.25)


def test_dropped_groups_are_counted_by_reason() -> None:
    assert filter_metrics({"zero_std_1.0": 3, "a/b": 1}) == {
        "rollout/dynamic_filter/drop_zero_std_1.0": 3,
        "rollout/dynamic_filter/drop_a_b": 1,
    }


def test_every_metric_that_is_made_is_a_row_of_the_table() -> None:
    draft = DraftReport(0.5, 1.0, (0.7,), (0.6,), {"rejection": 2.5, "block": 2.6}, 4, 1, 1.5)
    report = TrainReport(0.1, 0.2, 1.5, 0.9, 0.01, 0.0, 1e-6, 100, 75, 1, 4, draft, 0.01)
    report = replace(report, lr=1e-5, tis=TisReport(1.1, 0.2, 0.3), reward_kl=0.4)
    push = PushReport(version=3, seconds=0.5, nbytes=1000, num_tensors=7, checksum="ab", verified=True, verify_s=0.2)
    push = replace(push, paused_s=0.8)
    made = {
        **rollout_metrics([drafted_by(1, (1, 2, 1)), controlled((1,), (1,), 3, 9, version=8), of_turns()]),
        **filter_metrics({"zero_std_1.0": 1}),
        **train_metrics(report),
        **push_metrics(push),
        **draft_push_metrics(push),
        **draft_update_metrics(True, 2.0, 1.0),
        **sudden_drop_metrics(True),
        **perf_metrics([sample()], {"rollout": 1.0, "train": 1.0, "sync": 1.0, "draft_sync": 1.0, "eval": 1.0}, 3.0),
        **evaluation_metrics("aime", [drafted_by(1, (1, 2, 1))], 1),
        **said_by_engines(),
    }
    assert made["train/trained_token_share"] == 0.75
    assert (made["train/lr"], made["train/reward_kl"]) == (1e-5, 0.4)
    assert (made["train/tis"], made["train/tis_clipfrac"], made["train/tis_abs"]) == (1.1, 0.2, 0.3)
    absent = ("entropy", "train_rollout_logprob_abs_diff", "routing_disagreement", "lr", "reward_kl", "tis")
    nothing_trained = train_metrics(replace(report, **dict.fromkeys(absent)))
    assert {f"train/{name}" for name in (*absent, "tis_clipfrac", "tis_abs")}.isdisjoint(nothing_trained)
    rows = {metric(name).name for name in made}
    assert made["sync/bytes_per_s"] == 2000
    assert made["train/train_rollout_logprob_abs_diff"] == 1e-6
    assert rows == {row.name for row in TABLE}, "a row that nothing logs is a promise nobody keeps"


def test_acceptance_is_told_by_version_only_where_a_step_mixes_versions() -> None:
    old, new = sample(length=9, histogram=(0, 0, 0, 2), version=3), sample(length=6, histogram=(5,), version=4)
    metrics = rollout_metrics([old, new, replace(old, prompt=new.prompt)])
    by_version = {name: value for name, value in metrics.items() if "by_version" in name}
    assert by_version == {"spec/accept_length_by_version/3": 18 / 4, "spec/accept_length_by_version/4": 6 / 5}
    assert not [name for name in rollout_metrics([old, old]) if "by_version" in name]
    assert metric("spec/accept_length_by_version/17").unit == "tokens/round"


def test_the_drafts_lag_is_a_mean_over_the_samples_that_speculated_with_a_draft_that_has_weights() -> None:
    assert rollout_metrics([drafted_by(7), drafted_by(4), drafted_by(0, ())])["spec/draft_version_lag"] == 1.5
    assert "spec/draft_version_lag" not in rollout_metrics([drafted_by(None)])


def test_lossy_samples_are_a_share_of_those_that_were_verified() -> None:
    exact, unverified = sample(histogram=(2,)), sample()
    lossy = replace(exact, response=replace(exact.response, lossy=True))
    assert rollout_metrics([exact, lossy, exact, exact, unverified])["spec/lossy_ratio"] == 1 / 4
    assert "spec/lossy_ratio" not in rollout_metrics([unverified])


def controlled(
    histogram: tuple[int, ...], num_tried: tuple[int, ...], num_off_steps: int, length: int, version: int = 0
) -> Sample:
    """A sample of an engine that decides round by round how deep to draft."""
    given = sample(length=length, histogram=histogram, version=version)
    counters = replace(given.response.spec, num_tried=num_tried, num_off_steps=num_off_steps)
    return replace(given, response=replace(given.response, spec=counters))


def test_plain_steps_that_were_chosen_are_in_no_rate_and_no_length() -> None:
    # 4 rounds: 3 drafted one token, of which 2 stood; one drafted two, of which both stood. And 10 plain steps.
    metrics = rollout_metrics([controlled((1, 2, 1), (4, 1), 10, 1 + 10 + 4 + 4)])
    assert metrics["rollout/spec_accept_length"] == (1 + 4 + 4) / 4
    assert metrics["spec/off_ratio"] == 10 / 14
    assert metrics["spec/accept_rate_pos_0"] == 3 / 4
    assert metrics["spec/accept_rate_pos_1"] == 1.0, "only one round tried the second position"
    assert metrics["spec/accept_rate_cum_pos_1"] == 3 / 4
