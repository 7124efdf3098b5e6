"""Draft lengths by formula: RTP-LLM's, and by what rounds cost; and the table of break-even lengths."""

from __future__ import annotations

import random

import pytest

from slime_spec.speculation.controller import RowState
from slime_spec.speculation.cost_table import break_even_length, cost_table
from slime_spec.speculation.draft_length import (
    length_by_costs,
    length_by_step_share,
    rate_of_length,
    speed_up,
    tokens_of,
)
from slime_spec.speculation.exhaustive import best_depths
from slime_spec.speculation.round_costs import FREE, DraftTimes, PassCurve, RoundCosts

# Eight rows are free, then every row costs 2.5 ms: a CPU.
POINTS = ((1, 0.02), (8, 0.02), (16, 0.04), (64, 0.16))
DEPTHS = range(1, 8)


def costs_of(draft: DraftTimes = FREE, attend_s: float = 0.0) -> RoundCosts:
    return RoundCosts(PassCurve(POINTS), attend_s, draft_guess=draft)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.1, 0.2, 0.6])
def test_at_equal_rates_the_formula_is_leviathans(alpha: float, share: float) -> None:
    speeds = [(1 - alpha ** (k + 1)) / ((1 - alpha) * (share * k + 1)) for k in range(21)]
    assert length_by_step_share([alpha] * 20, share) == speeds.index(max(speeds))


def test_no_draft_gains_where_acceptance_is_below_the_draft_steps_share() -> None:
    assert length_by_step_share([0.3] * 7, 0.31) == 0
    assert length_by_step_share([0.3] * 7, 0.29) == 1


def test_tokens_of_a_round_stop_to_grow_where_no_position_is_known() -> None:
    assert tokens_of((0.5, 0.4), 0) == 1.0
    assert tokens_of((0.5, 0.4), 1) == 1.5
    assert tokens_of((0.5, 0.4), 2) == tokens_of((0.5, 0.4), 7) == pytest.approx(1.7)


def test_the_length_by_costs_is_that_of_the_exhaustive_policy() -> None:
    rng = random.Random(0)
    for _ in range(100):
        rates = [rng.uniform(0.1, 0.95) for _ in DEPTHS]
        costs = costs_of(
            DraftTimes(rng.uniform(0.0, 1e-3), rng.uniform(1e-4, 4e-3), rng.uniform(1e-5, 1e-3)),
            rng.choice((0.0, 1e-6)),
        )
        context = rng.choice((16, 200))
        length, gain = length_by_costs(costs, rates, batch=1, context=context)
        (depth,), best = best_depths(costs, rates, [RowState(context, max_depth=7)], DEPTHS)
        assert length == depth
        plain = best_depths(costs, rates, [RowState(context, max_depth=0)], DEPTHS)[1]
        assert gain == pytest.approx(best / plain)


def test_what_the_draft_reads_first_costs_too() -> None:
    # 4 at once, 3 drafts: 16 rows, 40 ms of 20; the passes ask for 2 tokens each, so 8 tokens of 1 ms are read.
    free, reading = costs_of(), costs_of(DraftTimes(token=0.001))
    assert break_even_length(free, 4, 100, 3) == pytest.approx(2.0)
    assert break_even_length(reading, 4, 100, 3) == pytest.approx((0.04 + 0.008) / 0.02)


def test_more_at_once_than_free_rows_make_every_length_a_loss() -> None:
    costs, rates = costs_of(), [0.9] * 7
    assert length_by_costs(costs, rates, batch=1, context=0) == (7, pytest.approx(tokens_of(rates, 7)))
    assert length_by_costs(costs, rates, batch=64, context=0) == (0, 1.0)
    assert speed_up(costs, rates, 64, 0, 1) == pytest.approx(1.9 / 2.0)


@pytest.mark.parametrize("length", [1.0, 1.2, 2.5, 5.0, 7.9, 8.0])
def test_a_rate_brings_the_length_it_was_found_for(length: float) -> None:
    rate = rate_of_length(length, 7)
    assert sum(rate**i for i in range(8)) == pytest.approx(length)


def test_the_table_has_a_line_for_each_batch_and_context_and_says_where_no_draft_pays() -> None:
    costs = costs_of(attend_s=1e-6)
    table = cost_table(costs, has_network=False, batches=(2, 64), contexts=(0, 1000), depths=(1, 3))
    assert [(line.batch, line.context) for line in table.lines] == [(2, 0), (64, 0), (2, 1000), (64, 1000)]
    near, far = table.lines[0], table.lines[2]
    assert near.break_even == pytest.approx((1.0, 1.0))
    assert far.plain_s == pytest.approx(0.022)
    assert far.break_even == pytest.approx((0.024 / 0.022, 0.028 / 0.022))
    assert (table.most(near), table.most(table.lines[1])) == (pytest.approx(4.0), pytest.approx(1.0))
    title, columns, *lines = table.text()
    assert title.endswith("; drafts count as free")
    assert columns.split() == ["batch", "context", "plain_ms", "d=1", "d=3", "perfect", "drafts"]
    assert lines[0].split() == ["2", "0", "20.00", "1.00", "1.00", "4.00x"]
    assert lines[1].endswith("never pay")


def test_the_table_says_whether_drafting_was_measured() -> None:
    costs = costs_of(DraftTimes(0.0, 0.001, 0.0001, 0.0001))
    assert cost_table(costs, has_network=True).drafting == "guessed"
    costs.observe_draft(1, 1, 0, 0.002)
    assert cost_table(costs, has_network=True).drafting == "measured"
    free = cost_table(costs, has_network=False)
    assert free.drafting == "free"
    assert free.lines[0].break_even[0] < cost_table(costs, has_network=True).lines[0].break_even[0]


def test_fresh_costs_start_from_the_same_passes_and_are_corrected_apart() -> None:
    costs = costs_of(attend_s=1e-6)
    other = costs.fresh()
    for _ in range(50):
        other.observe_pass(8, 0, 0.04)
    assert other.pass_s(8, 100) > 0.03
    assert costs.pass_s(8, 100) == pytest.approx(0.0201)
