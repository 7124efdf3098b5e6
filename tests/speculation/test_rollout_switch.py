"""An engine whose rounds are not ours drafts in the rollouts in which that is faster, by measured costs alone."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate, pairwise, takewhile

import pytest

from slime_spec.speculation.break_even import BreakEven
from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.speculation.rollout_replay import Replay, replay
from slime_spec.speculation.rollout_switch import (
    FOR_OFF,
    PROBE_SHARE,
    AcceptLength,
    BatchUse,
    RolloutSwitch,
    grid_size,
)

# CPU milliseconds of a whole round at temperature 1, recorded for SmolLM2-135M in fp32: without drafts, and with three.
OFF_MS = {1: 28.7, 4: 29.7, 8: 32.8, 16: 58.4, 32: 104.8, 64: 195.5}
THREE_MS = {1: 35.3, 4: 63.5, 8: 110.6, 16: 206.9, 32: 407.9, 64: 829.0}
# Acceptance by position given the positions before, before and after training (block verification, argmax).
BEFORE, AFTER = (0.544, 0.665, 0.685), (0.896, 0.830, 0.750)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def table(points: dict[int, float]) -> Callable[[int], float]:
    """Seconds by batch, straight lines between the recorded ones."""
    sizes = sorted(points)

    def seconds(batch: int) -> float:
        right = bisect_left(sizes, batch)
        high, low = sizes[right], sizes[max(0, right - (sizes[right] > batch))]
        share = 0.0 if low == high else (batch - low) / (high - low)
        return ((1 - share) * points[low] + share * points[high]) / 1000

    return seconds


STEP_S, ROUND_S = table(OFF_MS), table(THREE_MS)


def drawn(rates: tuple[float, ...], seed: int = 0) -> Callable[[], int]:
    """Tokens of a round: accepted drafts, and the token that every round brings."""
    rng = random.Random(seed)
    return lambda: 1 + sum(takewhile(bool, (rng.random() < rate for rate in rates)))


def length_of(rates: tuple[float, ...]) -> float:
    return 1 + sum(accumulate(rates, lambda so_far, rate: so_far * rate))


def knowing(rates: tuple[float, ...] | None) -> RolloutSwitch:
    """A switch that has measured every batch of the table, and drafts of these rates."""
    switch = RolloutSwitch(3)
    for size in SIZES:
        for _ in range(5):
            switch.break_even.observe(size, ROUND_S(size) / STEP_S(size))
    if rates is not None:
        switch.accept_length.observe(round(10_000 * length_of(rates)), 10_000)
    return switch


def both(lengths: list[int], rates: tuple[float, ...]) -> tuple[Replay, Replay, RolloutSwitch]:
    """The same rollout without and with drafts, and a switch that has seen what the latter's rounds brought."""
    drafted, switch = replay(lengths, ROUND_S, drawn(rates)), knowing(None)
    switch.accept_length.observe(sum(lengths), drafted.num_rounds)
    return replay(lengths, STEP_S), drafted, switch


ROLLOUTS = {
    "64 at once": [30 + index % 3 for index in range(64)],
    "64, long tail": [round(random.Random(7 * index).lognormvariate(4.1, 1.0)) + 1 for index in range(64)],
    "8": [120 + 10 * index for index in range(8)],
    "4": [300] * 4,
    "1": [300],
}


@pytest.mark.parametrize("rates", [BEFORE, AFTER], ids=["before", "after"])
@pytest.mark.parametrize("name", ROLLOUTS)
@pytest.mark.parametrize("ran_with_drafts", [False, True])
def test_the_gain_in_sums_is_the_gain_of_rollouts_played_round_by_round(
    name: str, rates: tuple[float, ...], ran_with_drafts: bool
) -> None:
    """Sums do not see that drafts scatter the ends of sequences that would end together: 6.5 % at most, of eight."""
    plain, drafted, switch = both(ROLLOUTS[name], rates)
    gain = switch.gain(drafted.uses if ran_with_drafts else plain.uses, ran_with_drafts)
    assert gain is not None
    assert gain.value == pytest.approx(plain.seconds / drafted.seconds, rel=0.065)


@pytest.mark.parametrize("rates", [BEFORE, AFTER], ids=["before", "after"])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_the_next_rollout_does_what_was_faster_when_both_were_played(name: str, rates: tuple[float, ...]) -> None:
    plain, drafted, switch = both(ROLLOUTS[name], rates)
    for _ in range(3):
        ran_with_drafts = switch.speculates
        switch.decide(drafted.uses if ran_with_drafts else plain.uses, ran_with_drafts)
    chosen = drafted.seconds if switch.speculates else plain.seconds
    assert chosen <= 1.05 * min(plain.seconds, drafted.seconds)
    if not 0.94 < plain.seconds / drafted.seconds < 1.06:
        assert switch.speculates is (plain.seconds > drafted.seconds)


def use_at(batch: int, drafted: bool) -> list[BatchUse]:
    step_s = ROUND_S(batch) if drafted else STEP_S(batch)
    return [BatchUse(batch, 100 * step_s, 100 * batch)]


def test_what_is_not_known_changes_nothing() -> None:
    switch = RolloutSwitch(3)
    assert switch.decide(use_at(64, True), drafted=True) is None
    assert switch.speculates
    switch.accept_length.observe(200, 100)
    assert switch.decide(use_at(64, True), drafted=True) is None
    switch.break_even.observe(4, 1.1)
    assert switch.gain(use_at(6, True), drafted=True) is not None
    assert switch.decide(use_at(64, True), drafted=True) is None
    assert switch.speculates
    assert switch.benefit(use_at(64, True), drafted=True) == NetBenefit()
    assert switch.benefit(use_at(64, False), drafted=False) == NetBenefit()


def test_most_of_a_rollouts_time_must_be_at_known_batches() -> None:
    switch = RolloutSwitch(3)
    switch.accept_length.observe(300, 100)
    switch.break_even.observe(4, 1.2)
    little, much = BatchUse(4, 8.0, 100), BatchUse(64, 2.0, 100)
    assert switch.gain([little, much], drafted=False) is None
    gain = switch.gain([little, much._replace(seconds=0.5)], drafted=False)
    assert gain is not None
    assert gain.value == pytest.approx(3.0 / 1.2)


def test_drafts_near_break_even_are_neither_begun_nor_given_up_for_noise() -> None:
    rng = random.Random(1)
    begun, given_up = knowing(None), knowing(None)
    begun.speculates = False
    for _ in range(200):
        for switch in (begun, given_up):
            ratio = ROUND_S(4) / STEP_S(4)
            switch.accept_length.observe(round(1000 * 1.015 * ratio * rng.uniform(0.99, 1.01)), 1000)
            switch.decide(use_at(4, switch.speculates), switch.speculates)
    assert (begun.speculates, given_up.speculates) == (False, True)


def test_a_draft_that_gets_better_in_a_run_is_turned_on_once_and_stays_on() -> None:
    """Accept lengths rise from before training to after it, at 4 sequences, with the noise of 400 rounds each."""
    switch, history = knowing(None), []
    for step in range(60):
        share = min(1.0, step / 40)
        rates = tuple((1 - share) * low + share * high for low, high in zip(BEFORE, AFTER, strict=True))
        draw = drawn(rates, seed=step)
        switch.accept_length.observe(sum(draw() for _ in range(400)), 400)
        switch.decide(use_at(4, switch.speculates), switch.speculates)
        history.append(switch.speculates)
    changes = sum(one != other for one, other in pairwise(history))
    assert history[-1]
    assert changes <= 2  # off where the first drafts do not pay, then on


def test_doubt_keeps_an_engine_off() -> None:
    sure, unsure = RolloutSwitch(3), RolloutSwitch(3)
    for switch, count in ((sure, 8), (unsure, 1)):
        switch.speculates = False
        switch.accept_length.observe(20_000, 10_000)
        for index in range(count):
            switch.break_even.observe(8, 1.93 + 0.001 * index)
        switch.decide(use_at(8, False), drafted=False)
    assert (sure.speculates, unsure.speculates) == (True, False)


def test_the_benefit_of_a_rollout_is_its_time_and_that_of_plain_steps() -> None:
    switch = RolloutSwitch(3)
    switch.accept_length.observe(3000, 1000)
    switch.break_even.observe(8, 2.0)
    drafted = switch.benefit([BatchUse(8, 4.0, 1000)], drafted=True)
    assert drafted.spent_s == drafted.drafted_s == 4.0
    assert drafted.plain_s == pytest.approx(4.0 * 3.0 / 2.0)
    assert drafted.one_step_s == pytest.approx(2.0)
    # Three tokens a round of one to four: a standard deviation of at most sqrt(2), a thousand rounds.
    assert drafted.error_s == pytest.approx(6.0 * (0.05 + (2 / 1000) ** 0.5 / 3))
    assert switch.benefit([BatchUse(8, 4.0, 1000)], drafted=False) == NetBenefit(4.0, 4.0)


def test_batches_pay_up_to_where_rounds_cost_as_much_as_they_bring() -> None:
    assert RolloutSwitch(3).pays_up_to is None
    assert knowing(None).pays_up_to is None
    assert knowing((0.01, 0.01, 0.01)).pays_up_to == 0
    before, after = knowing(BEFORE).pays_up_to, knowing(AFTER).pays_up_to
    assert before == max(size for size in SIZES if length_of(BEFORE) > FOR_OFF * ROUND_S(size) / STEP_S(size))
    assert after is not None
    assert before is not None
    assert before <= after < 64


def test_a_batch_that_matters_is_measured_at_once_and_again_as_rollouts_pay_for_it() -> None:
    switch = RolloutSwitch(3)
    switch.accept_length.observe(300, 100)
    uses = [BatchUse(30, 10.0, 3000), BatchUse(5, 4.0, 300), BatchUse(1, 0.5, 20)]
    measured = []
    for _ in range(300):
        size = switch.batch_to_measure(uses, drafted=True)
        measured.append(size)
        if size is not None:
            switch.break_even.observe(size, 1.2)
            switch.note_measurement(size, 2.0)
    assert measured[:2] == [24, 4], "those of a tenth of the time or more, the larger share first"
    again = [size for size in measured[2:] if size is not None]
    assert set(again) == {24, 4}
    assert 2.0 * len(again) <= PROBE_SHARE * 300 * 14.5 + 2.0
    assert len(again) >= 5


def test_an_engine_that_is_off_measures_nothing_where_perfect_drafts_would_not_pay() -> None:
    switch = RolloutSwitch(1)
    switch.accept_length.observe(150, 100)
    switch.break_even.observe(64, 2.0)
    switch.speculates = False
    uses = [BatchUse(64, 1000.0, 1000)]
    assert switch.batch_to_measure(uses, drafted=False) is None
    switch.speculates = True
    assert switch.batch_to_measure(uses, drafted=True) == 64


def test_break_even_lies_on_lines_between_measured_batches_and_is_unknown_beyond() -> None:
    curve = BreakEven()
    assert curve.at(4) is None
    curve.observe(4, 1.0)
    curve.observe(16, 4.0)
    values = {size: curve.at(size) for size in (1, 4, 8, 16, 24, 25)}
    assert values[25] is None
    found = [value.value for value in values.values() if value]
    assert found == pytest.approx([1.0, 1.0, 2.0, 4.0, 4.0])


def test_pairs_that_scatter_are_doubted_and_new_pairs_replace_old() -> None:
    steady, wild = BreakEven(), BreakEven()
    for index in range(10):
        steady.observe(8, 1.5)
        wild.observe(8, 1.2 if index % 2 else 1.8)
    steady_at, wild_at = steady.at(8), wild.at(8)
    assert steady_at is not None
    assert wild_at is not None
    assert steady_at.relative_error < 0.02 < 0.05 < wild_at.relative_error
    for _ in range(40):
        steady.observe(8, 3.0)
    later = steady.at(8)
    assert later is not None
    assert later.value == pytest.approx(3.0, rel=0.02)


def test_an_accept_length_follows_the_policy() -> None:
    length = AcceptLength(3)
    assert length.estimate is None
    length.observe(0, 0)
    assert length.estimate is None
    for _ in range(10):
        length.observe(1500, 1000)
    for _ in range(10):
        length.observe(3000, 1000)
    assert length.estimate is not None
    assert length.estimate.value == pytest.approx(3.0, rel=0.03)


def test_measured_batches_are_at_most_half_as_large_again_as_the_next() -> None:
    sizes = [grid_size(batch) for batch in range(1, 200)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192]
    assert all(size <= batch <= 1.5 * size for batch, size in enumerate(sizes, start=1))


def test_a_replayed_rollout_counts_its_tokens_and_seconds() -> None:
    played = replay([1, 2, 0, 3], lambda batch: float(batch))
    assert played.uses == (BatchUse(3, 3.0, 3), BatchUse(2, 2.0, 2), BatchUse(1, 1.0, 1))
    assert (played.seconds, played.num_rounds) == (6.0, 6)
    assert replay([4], lambda _: 1.0, lambda: 3).uses == (BatchUse(1, 2.0, 4),)
