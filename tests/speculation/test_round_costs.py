"""Round costs follow what is measured, and say how far off they were."""

from __future__ import annotations

import random

import pytest

from slime_spec.speculation.acceptance import COMMON_WEIGHT, PRIOR, PRIOR_WEIGHT, WINDOW, RunningAcceptance
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.speculation.plain_schedule import PlainSchedule
from slime_spec.speculation.remaining import RemainingTokens
from slime_spec.speculation.round_costs import PassCurve, RoundCosts

POINTS = ((1, 0.02), (8, 0.02), (16, 0.04), (64, 0.16))


def test_a_curve_is_straight_between_its_points_and_goes_on_behind_the_last() -> None:
    curve = PassCurve(POINTS)
    assert [curve.at(rows) for rows in (1, 5, 12, 40, 128)] == pytest.approx([0.02, 0.02, 0.03, 0.1, 0.32])


def test_a_point_that_a_disturbance_made_dearer_than_a_larger_pass_does_not_stay_above_it() -> None:
    curve = PassCurve(((1, 0.05), (8, 0.02), (4, 0.03), (16, 0.04)))
    assert [curve.at(rows) for rows in (1, 4, 8, 16)] == [0.02, 0.02, 0.02, 0.04]


def test_a_machine_that_slows_down_by_half_is_followed_at_every_size() -> None:
    costs = RoundCosts(PassCurve(POINTS))
    for _ in range(200):
        costs.observe_pass(8, 0, 0.03)
    assert costs.pass_s(8, 0) == pytest.approx(0.03, rel=0.01)
    assert costs.pass_s(64, 0) > 0.18  # by what all passes have in common


def test_one_interrupted_pass_changes_little() -> None:
    costs = RoundCosts(PassCurve(POINTS))
    costs.observe_pass(8, 0, 2.0)
    assert costs.pass_s(8, 0) < 0.0217


def test_passes_far_from_every_point_become_points() -> None:
    curve = PassCurve()
    curve.observe(8, 0.02)
    assert curve.at(8) == 0.02
    curve.observe(64, 0.16)
    assert curve.at(36) == pytest.approx(0.09)


def test_positions_attended_to_cost_besides_rows() -> None:
    costs = RoundCosts(PassCurve(POINTS), attend_s=1e-6)
    assert costs.pass_s(8, 10_000) == pytest.approx(0.03)
    before = costs.pass_s(8, 0)
    costs.observe_pass(8, 10_000, 0.03)  # just as predicted
    assert costs.pass_s(8, 0) == pytest.approx(before)


def test_the_recent_error_of_predictions_is_known() -> None:
    costs = RoundCosts(PassCurve(POINTS))
    rng = random.Random(0)
    for _ in range(2000):
        costs.observe_pass(8, 0, 0.02 * rng.lognormvariate(0.0, 0.1))
    assert costs.relative_error == pytest.approx(0.1, rel=0.3)


def test_drafting_is_fitted_whatever_was_guessed() -> None:
    costs = RoundCosts(PassCurve(POINTS))
    rng = random.Random(0)
    once_s, step_s, row_s, token_s = 0.001, 0.004, 0.0001, 0.0003
    for _ in range(300):
        count, steps, backlog = rng.randint(1, 16), rng.choice((1, 2, 3, 5)), rng.randint(0, 60)
        seconds = once_s + steps * step_s + count * steps * row_s + backlog * token_s
        costs.observe_draft(count, steps, backlog, seconds * rng.lognormvariate(0.0, 0.05))
    assert costs.draft_s(4, 3, 8) == pytest.approx(once_s + 3 * step_s + 12 * row_s + 8 * token_s, rel=0.05)
    assert costs.draft_s(12, 1, 50) == pytest.approx(once_s + step_s + 12 * row_s + 50 * token_s, rel=0.07)
    assert costs.draft_s(0, 3, 8) == 0.0


def test_acceptance_counts_a_node_only_where_its_parent_was_accepted() -> None:
    acceptance = RunningAcceptance(4)  # the last is never drafted
    for _ in range(400):
        acceptance.observe((-1, 0, 1), ())
    assert acceptance.rate(0) < 0.01
    assert acceptance.rate(1) == pytest.approx(PRIOR * PRIOR_WEIGHT / (PRIOR_WEIGHT + WINDOW), rel=0.01)  # as of all
    # A tree: 1 and 2 are children of the root and of 0.
    acceptance.observe((-1, -1, 0), (0, 2))
    assert acceptance.rate(2) == pytest.approx((1 + COMMON_WEIGHT * acceptance.rate(3)) / (1 + COMMON_WEIGHT))


def test_acceptance_forgets_what_is_long_past() -> None:
    acceptance = RunningAcceptance(1)
    for path in ((),) * 1000 + ((0,),) * 200:
        acceptance.observe((-1,), path)
    assert acceptance.rate(0) > 0.95


def test_the_chances_of_nodes_multiply_along_their_paths() -> None:
    acceptance = RunningAcceptance(4)
    assert acceptance.chances((-1, 0, 0, 2)) == pytest.approx([PRIOR, PRIOR**2, PRIOR**2, PRIOR**3])
    assert acceptance.chain(2) == pytest.approx([PRIOR, PRIOR**2])


def test_remaining_tokens_are_the_mean_of_what_longer_replies_had_left() -> None:
    remaining = RemainingTokens()
    for length in (10, 20, 30, 40, 50):
        remaining.observe(length)
    assert remaining.expected(10, 1000) == pytest.approx((10 + 20 + 30 + 40) / 4)
    assert remaining.expected(10, 5) == 5.0
    assert remaining.expected(45, 1000) == 45.0  # too few were longer
    for _ in range(1000):
        remaining.observe(12)
    assert remaining.expected(8, 1000) == pytest.approx(4.0)  # the older ones are forgotten


def test_net_benefit_counts_plain_steps_on_both_sides() -> None:
    total = NetBenefit().with_plain(1.0).with_round(0.03, 2, 5, 0.02, 0.1)
    assert total.spent_s == pytest.approx(1.03)
    assert total.plain_s == pytest.approx(1.0 + 0.02 * 5 / 2)
    assert total.error_s == pytest.approx(0.005)
    assert total.drafted_s / total.one_step_s == pytest.approx(1.5)
    assert total.since(NetBenefit().with_plain(1.0)).spent_s == pytest.approx(0.03)
    # An engine that was restarted counts from nothing.
    assert total.since(NetBenefit(spent_s=9.0)) == total


STEP_S = {1: 0.02, 2: 0.022, 3: 0.03, 4: 0.04}


def test_a_schedule_of_plain_steps_is_what_ran() -> None:
    # Three sequences of 5, 3 and 4 tokens, the third of which comes two steps later.
    schedule = PlainSchedule()
    for keys in ((1, 2), (1, 2), (1, 2, 3), (1, 3), (1, 3), (3,)):
        schedule.round(dict.fromkeys(keys, 1))
    assert len(schedule) == 3
    assert schedule.settle(STEP_S.__getitem__) == pytest.approx(1.0)
    assert len(schedule) == 0


def test_a_straggler_is_no_gain_over_plain_steps_that_all_take_together() -> None:
    """Two sequences of four tokens; one needs one round, the other four: no plain step saved, three rounds alone."""
    schedule, benefit = PlainSchedule(), NetBenefit()
    for tokens in ({1: 4, 2: 1}, {2: 1}, {2: 1}, {2: 1}):
        schedule.round(tokens)
        count = len(tokens)
        benefit = benefit.with_round(STEP_S[count], count, sum(tokens.values()), STEP_S[count], 0.1)
    assert benefit.plain_s / benefit.spent_s == pytest.approx((2.5 * 0.022 + 3 * 0.02) / (0.022 + 3 * 0.02))
    share = schedule.settle(STEP_S.__getitem__)
    # By hand, in steps of 2.5 and three times 1: the first is there until 4, the second from 0 to 4.
    assert share == pytest.approx(4 * 0.022 / (2.5 * 0.022 + 3 * 0.02))
    settled = benefit.scaled_since(NetBenefit(), share)
    assert settled.plain_s == pytest.approx(4 * 0.022)
    assert settled.error_s == pytest.approx(0.1 * 4 * 0.022)
    assert settled.spent_s == benefit.spent_s


def test_a_schedule_agrees_with_plain_decoding_of_the_same_lengths() -> None:
    """Random drafts over random lengths that come at once: the reference takes plain steps one by one."""
    rng = random.Random(1)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(4)]
        left, schedule, of_rounds_s = dict(enumerate(lengths)), PlainSchedule(), 0.0
        while left:
            tokens = {key: min(remaining, rng.randint(1, 4)) for key, remaining in left.items()}
            schedule.round(tokens)
            of_rounds_s += STEP_S[len(tokens)] * sum(tokens.values()) / len(tokens)
            left = {key: remaining - tokens[key] for key, remaining in left.items() if remaining > tokens[key]}
        plain_s = sum(STEP_S[sum(length > step for length in lengths)] for step in range(max(lengths)))
        assert schedule.settle(STEP_S.__getitem__) * of_rounds_s == pytest.approx(plain_s)
