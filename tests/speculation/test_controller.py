"""The controller drafts exactly where the measured costs and the running acceptance say that it pays."""

from __future__ import annotations

import random
from itertools import accumulate
from operator import mul

import pytest

from slime_spec.speculation.controller import FIRST_DRAFTS, FOR_OFF, PROBE_SHARE, Controller, RowState
from slime_spec.speculation.exhaustive import best_cut, best_depths, tokens_per_s
from slime_spec.speculation.recent_drafts import Candidate
from slime_spec.speculation.round_costs import DraftTimes, PassCurve, RoundCosts

# Seconds of a pass by rows, and of drafting, as measured for SmolLM2-135M in fp32 on one CPU core: up to eight rows
# are free, and every further row costs the same.
MEASURED = ((1, 0.0205), (4, 0.0229), (8, 0.0229), (12, 0.0351), (16, 0.0411), (32, 0.0836), (64, 0.169), (128, 0.342))
DRAFTING = DraftTimes(0.0005, 0.0016, 0.0002, 0.0001)
# Acceptance by position given the positions before, before and after training (block verification, argmax).
BEFORE = (0.544, 0.665, 0.685, 0.710, 0.771, 0.7, 0.7)
AFTER = (0.896, 0.830, 0.750, 0.720, 0.972, 0.8, 0.8)


def measured_costs() -> RoundCosts:
    return RoundCosts(PassCurve(MEASURED), attend_s=3e-6, draft_guess=DRAFTING)


def controller_with(
    rates: tuple[float, ...], costs: RoundCosts | None = None, free: bool = False, cuts: bool = False
) -> Controller:
    """A controller that has seen many drafts accepted at these rates."""
    controller = Controller(costs or measured_costs(), 7, drafts_are_free=free, cuts_network=cuts)
    rng = random.Random(0)
    for _ in range(2000):
        controller.acceptance.observe(range(-1, 6), drawn_path(rates, 7, rng))
    return controller


def drawn_path(rates: tuple[float, ...], depth: int, rng: random.Random) -> tuple[int, ...]:
    accepted = 0
    while accepted < depth and rng.random() < rates[accepted]:
        accepted += 1
    return tuple(range(accepted))


def candidates(*chances: tuple[float, ...]) -> list[Candidate]:
    return [Candidate(each) for each in chances]


def rows(count: int, **state: float) -> list[RowState]:
    return [RowState(**{"context": 80, "max_depth": 7, **state}) for _ in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [12, 16, 32, 64])
def test_nothing_is_drafted_where_even_perfect_drafts_do_not_pay(batch: int) -> None:
    assert controller_with(BEFORE).plan(rows(batch)).depths == (0,) * batch


def test_texts_are_looked_up_only_where_drafts_that_cost_nothing_could_pay() -> None:
    assert controller_with(BEFORE).plan(rows(12)).texts_may_pay  # the next rows cost less than a token
    assert not controller_with(BEFORE).plan(rows(64)).texts_may_pay


@pytest.mark.parametrize("batch", [8, 9, 12, 13, 16, 17, 24, 33, 64])
def test_whether_free_drafts_could_pay_is_said_of_the_measured_passes(batch: int) -> None:
    """By every number of tokens that seven a sequence may be."""
    controller, costs = controller_with((0.0,) * 7), measured_costs()

    def tokens_a_second(num_drafted: int) -> float:
        num_rows = batch + num_drafted
        return num_rows / costs.pass_s(num_rows, 80 * num_rows)

    could_pay = any(tokens_a_second(count) > FOR_OFF * tokens_a_second(0) for count in range(1, 7 * batch + 1))
    plan = controller.plan(rows(batch))
    assert plan.is_probe or plan.texts_may_pay == could_pay


@pytest.mark.parametrize(("chance", "asked"), [(0.97, [True] * 8), (0.02, [False, False, False, True] * 2)])
def test_texts_that_have_not_paid_are_looked_up_once_in_four_plans(chance: float, asked: list[bool]) -> None:
    controller = controller_with((0.0,) * 7, cuts=True)
    controller.keep(rows(6), [Candidate((chance,), of_text=True)] * 6)
    assert [controller.plan(rows(6)).texts_may_pay for _ in range(8)] == asked


def test_one_sequence_drafts_deeper_the_better_its_drafts() -> None:
    (before,) = controller_with(BEFORE).plan(rows(1)).depths
    (after,) = controller_with(AFTER).plan(rows(1)).depths
    (never,) = controller_with((0.02,) * 7).plan(rows(1)).depths
    assert never == 0 < before < after == 7


def test_rows_below_the_knee_are_filled_though_not_every_sequence_drafts() -> None:
    depths = controller_with((0.8,) * 7).plan(rows(6)).depths
    assert sum(depths) > 0
    assert 6 + sum(depths) <= 9


def test_a_draft_is_no_deeper_than_its_sequence_allows() -> None:
    plan = controller_with(AFTER).plan([RowState(80, 2), RowState(80, 0)])
    assert plan.depths[0] in (1, 2)
    assert plan.depths[1] == 0


def test_what_must_be_caught_up_first_is_weighed_against_the_tokens_that_are_left() -> None:
    controller = controller_with(BEFORE)
    assert controller.plan(rows(1, backlog=300, remaining=3.0)).depths == (0,)
    assert controller_with(BEFORE).plan(rows(1, backlog=300, remaining=400.0)).drafts


@pytest.mark.parametrize("rates", [BEFORE, AFTER, (0.3,) * 7])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_choice_is_as_good_as_trying_every_combination(batch: int, rates: tuple[float, ...]) -> None:
    rng = random.Random(batch)
    for _ in range(20):
        points = sorted(rng.uniform(0.01, 0.1) for _ in range(6))
        costs = RoundCosts(PassCurve(list(zip((1, 2, 4, 8, 16, 32), points, strict=True))), 1e-6, DRAFTING)
        controller = controller_with(rates, costs)
        known = [controller.acceptance.rate(node) for node in range(7)]
        states = rows(batch)
        _, most = best_depths(costs, known, states, (1, 2, 3, 5, 7))
        chosen = tokens_per_s(costs, known, states, controller.plan(states).depths)
        # It prefers off within FOR_OFF, and tries one depth for all that draft.
        assert chosen >= most / FOR_OFF / 1.03


def test_the_rows_of_a_pass_go_to_the_likeliest_nodes() -> None:
    controller = controller_with(AFTER, free=True)
    kept = controller.keep(rows(4), candidates(tuple(0.9**node for node in range(1, 8)), (0.1, 0.1), (), (0.8, 0.5)))
    assert kept[0] > kept[3] > 0 == kept[1] == kept[2]


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_as_good_as_trying_every_combination(seed: int) -> None:
    rng = random.Random(seed)
    points = sorted(rng.uniform(0.01, 0.1) for _ in range(6))
    costs = RoundCosts(PassCurve(list(zip((1, 2, 4, 8, 16, 32), points, strict=True))), 1e-6, DRAFTING)
    states = [RowState(rng.randrange(20, 200), 4) for _ in range(3)]
    chances = [tuple(accumulate((rng.random() ** 0.5 for _ in range(4)), mul)) for _ in states]
    _, most = best_cut(costs, states, chances)
    kept = controller_with(AFTER, costs, cuts=True).keep(states, candidates(*chances))
    tokens = sum(1.0 + sum(of_row[:count]) for of_row, count in zip(chances, kept, strict=True))
    attended = sum((1 + count) * row.context for row, count in zip(states, kept, strict=True))
    # It tries a few numbers of nodes in all.
    assert tokens / costs.pass_s(len(states) + sum(kept), attended) >= 0.98 * most


def test_drafts_that_cannot_be_cut_are_kept_and_others_share_what_is_left_of_the_pass() -> None:
    fixed = Candidate((0.1,) * 4, num_fixed=4)
    sure, unsure = Candidate((0.95,) * 4, of_text=True), Candidate((0.05,) * 4, of_text=True)
    assert controller_with(BEFORE).keep(rows(3), [fixed, sure, unsure]) == [4, 4, 0]


def test_now_and_then_a_draft_that_would_be_cut_is_verified() -> None:
    """Or what the drafts that are always cut are worth would never be learned again."""
    costs = RoundCosts(PassCurve(((1, 0.02), (101, 0.12))), draft_guess=DRAFTING)  # a row takes a millisecond
    controller, unsure = controller_with(AFTER, costs, cuts=True), candidates(*[(0.02, 0.01, 0.01)] * 8)
    kept_rounds, spent_s = 0, 0.0
    for _ in range(500):
        kept = controller.keep(rows(8), unsure)
        seconds = controller.costs.pass_s(8 + sum(kept), 0)
        kept_rounds, spent_s = kept_rounds + bool(sum(kept)), spent_s + seconds
        controller.note_round(seconds)
    extra_s = kept_rounds * (controller.costs.pass_s(11, 0) - controller.costs.pass_s(8, 0))
    assert 0.0 < extra_s <= PROBE_SHARE * spent_s


def test_a_draft_that_tells_what_it_is_worth_is_cut_where_a_uniform_depth_would_not_pay() -> None:
    """At eight, half of the drafts stand and half fall: a depth for all loses, and the likely ones alone gain."""
    costs = RoundCosts(PassCurve(((1, 0.01), (101, 0.21))), draft_guess=DraftTimes(0.0001, 0.0005, 0.00005, 0.00001))
    drafts = candidates(*[(0.99, 0.98), (0.05, 0.01)] * 4)
    controller = controller_with((0.52,) + (0.5,) * 6, costs, cuts=True)
    assert not controller_with((0.52,) + (0.5,) * 6, costs).plan(rows(8)).drafts
    for _ in range(20):
        controller.keep(rows(8), drafts)
    plan = controller.plan(rows(8))
    assert plan.drafts
    assert plan.stop is not None
    assert 0.05 < plan.stop.below < 0.98
    assert controller.keep(rows(8), drafts)[1::2] == [0] * 4


def test_texts_alone_are_left_to_draft_where_a_network_would_not_bring_its_cost() -> None:
    controller = controller_with((0.3,) * 7, cuts=True)
    of_texts = [Candidate((0.95, 0.9, 0.85), of_text=True), Candidate((0.3,))] * 2
    for _ in range(30):
        controller.keep(rows(4), of_texts)
    plan = controller.plan(rows(4))
    assert not plan.drafts or plan.is_probe
    assert plan.is_probe or plan.texts_may_pay


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_drafted_without_weighing_every_option_only_where_none_would_pay(seed: int) -> None:
    """The quick bound on what the options bring agrees with all of them, one by one."""
    rng = random.Random(seed)
    controller = controller_with((rng.random(),) * 7, cuts=True)
    batch = [RowState(80, rng.randrange(1, 8), rng.randrange(60), 30.0, key) for key in range(rng.randrange(1, 12))]
    for _ in range(6):
        chances = [tuple(accumulate((rng.random() ** 0.3 for _ in range(rng.randrange(8))), mul)) for _ in batch]
        controller.keep(batch, [Candidate(each, of_text=rng.random() < 0.3) for each in chances])
    order = list(range(len(batch)))
    every = list(controller._options(batch, order, controller._pools(batch, (1, 2, 3, 5, 7))))
    most = max(controller._weighed(option) for option in every)
    for least in (0.5 * most, 0.999 * most, 1.001 * most, 1.1 * most, 2.0 * most):
        found = controller._weighed(controller._best_option(batch, order, least))
        assert found == pytest.approx(most) if least < most else found <= least


def test_the_last_of_a_batch_is_not_promised_what_the_others_drafts_brought() -> None:
    """Texts of seven sequences brought much and ended them early; the eighth never had a draft."""
    controller = controller_with((0.0,) * 7, cuts=True)
    batch = [RowState(80, 7, key=key) for key in range(8)]
    drafts = [Candidate((0.95, 0.9, 0.85), of_text=True)] * 7 + [Candidate()]
    for _ in range(5):
        controller.keep(batch, drafts)
    assert controller.plan(batch[:3]).texts_may_pay
    asked = [controller.plan(batch[7:]).texts_may_pay for _ in range(8)]
    assert sum(asked) == 2, "only now and then"


def test_a_likely_node_behind_an_unlikely_one_is_not_kept_for_itself() -> None:
    # A draft is cut to its first nodes: what comes later cannot be likelier than what it stands behind.
    assert controller_with(AFTER, free=True).keep(rows(6), candidates((0.01, 1.0, 1.0), *([()] * 5))) == [0] + [0] * 5


def test_free_drafts_are_asked_for_only_where_perfect_drafts_would_pay() -> None:
    controller = controller_with(BEFORE, free=True)
    assert controller.plan(rows(2)).depths == (7, 7)
    assert not controller.plan(rows(64)).drafts


def test_probes_take_less_than_their_share_of_the_time() -> None:
    controller = controller_with((0.02,) * 7)
    spent_s = probed_s = 0.0
    for _ in range(8_000):
        plan = controller.plan(rows(4))
        if not plan.drafts:
            seconds = controller.costs.pass_s(4, 320)
            controller.note_round(seconds)
        else:
            assert plan.is_probe
            assert sum(depth > 0 for depth in plan.depths) == 1
            steps = max(plan.depths)
            seconds = controller.costs.pass_s(4 + steps, 320 + 80 * steps) + controller.costs.draft_s(1, steps)
            probed_s += seconds - controller.costs.pass_s(4, 320)
        spent_s += seconds
    assert 0.0 < probed_s <= PROBE_SHARE * spent_s


def test_a_controller_that_begins_learns_in_its_first_rounds_and_pays_the_time_back() -> None:
    """Drafts are better than the guess with which it begins, and pay where the guess would not."""
    costs = RoundCosts(PassCurve(((1, 0.02), (101, 0.04))), draft_guess=DRAFTING)
    controller, rng = Controller(costs, 7), random.Random(2)
    rates, num_rounds, num_probes = (0.95,) * 7, 0, 0
    while num_rounds < 60:
        plan = controller.plan(rows(24))
        num_rounds, num_probes = num_rounds + 1, num_probes + plan.is_probe
        if plan.drafts and not plan.is_probe:
            break
        controller.note_round(controller.costs.pass_s(24, 1920))
        for depth in filter(None, plan.depths):
            controller.acceptance.observe(range(-1, depth - 1), drawn_path(rates, depth, rng))
    assert 0 < num_probes <= FIRST_DRAFTS
    assert num_rounds <= FIRST_DRAFTS + 1


def test_it_turns_on_again_once_probes_say_that_the_draft_has_learned() -> None:
    controller, rng = controller_with((0.02,) * 7), random.Random(1)
    for _ in range(6_000):
        plan = controller.plan(rows(4))
        if plan.drafts and not plan.is_probe:
            break
        if not plan.drafts:
            controller.note_round(0.0229)
        for depth in filter(None, plan.depths):
            controller.acceptance.observe(range(-1, depth - 1), drawn_path(AFTER, depth, rng))
    assert plan.drafts
    assert not plan.is_probe


@pytest.mark.parametrize("rates", [BEFORE, AFTER, (0.05,) * 7])
@pytest.mark.parametrize("batch", [1, 2, 4, 6, 8, 16, 64])
def test_replayed_costs_and_acceptance_are_never_slower_than_off_or_the_best_fixed_depth(
    batch: int, rates: tuple[float, ...]
) -> None:
    """Rounds are replayed with the measured costs, noise in the clock, and acceptance drawn by position.

    The controller learns from what was drawn; what a round brings is counted as its mean, which no luck moves.
    """
    gained = [0.0, *accumulate(accumulate(rates, mul))]
    rng, truth = random.Random(batch), measured_costs()
    controller = Controller(measured_costs(), 7)
    tokens = seconds = 0.0
    for _ in range(600):
        plan = controller.plan(rows(batch))
        paths = [drawn_path(rates, depth, rng) for depth in plan.depths]
        verified = batch + sum(plan.depths)
        attended = sum(80 * (1 + depth) for depth in plan.depths)
        num_drafting = sum(depth > 0 for depth in plan.depths)
        pass_s, draft_s = truth.pass_s(verified, attended), truth.draft_s(num_drafting, plan.steps, 2 * num_drafting)
        seconds += pass_s + draft_s
        tokens += batch + sum(gained[depth] for depth in plan.depths)
        noise = rng.lognormvariate(0.0, 0.1)
        controller.costs.observe_pass(verified, attended, pass_s * noise)
        if num_drafting:
            controller.costs.observe_draft(num_drafting, plan.steps, 2 * num_drafting, draft_s * noise)
        else:
            controller.note_round(pass_s)
        for depth, path in zip(plan.depths, paths, strict=True):
            if depth:
                controller.acceptance.observe(range(-1, depth - 1), path)
    fixed = [tokens_per_s(truth, rates, rows(batch, backlog=2), (depth,) * batch) for depth in (0, 1, 2, 3, 5, 7)]
    assert tokens / seconds >= 0.97 * max(fixed)
    assert tokens / seconds >= 0.98 * fixed[0]
