"""A pool of recent drafts says what the next round's bring: compared with counting the nodes one by one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import pytest

from slime_spec.speculation.recent_drafts import KEPT_DRAFTS, Candidate, RecentDrafts

ANYONE = ()  # no sequence that ran before


def note(recent: RecentDrafts, candidates: Sequence[Candidate], first_key: int = 0) -> None:
    recent.note(candidates, range(first_key, first_key + len(candidates)))


def drawn(rng: random.Random, length: int, of_text: bool = False) -> Candidate:
    rates = [rng.random() for _ in range(length)]
    return Candidate(tuple(prod(rates[: node + 1]) for node in range(length)), of_text)


def test_as_many_sequences_as_drafts_keep_the_likeliest_nodes() -> None:
    rng = random.Random(0)
    recent, drafts = RecentDrafts(4), [drawn(rng, 4) for _ in range(6)]
    note(recent, drafts)
    for depth, pool in recent.pools((1, 2, 4), [0.5] * 4, 0.0, ANYONE).items():
        likeliest = sorted((chance for each in drafts for chance in each.chances[:depth]), reverse=True)
        for count in range(6 * depth + 1):
            assert pool.brought(np.array([float(count)]), 6)[0] == pytest.approx(sum(likeliest[:count]))
        assert pool.nodes_per_draft == depth
        assert pool.asked == 1.0


def test_fewer_sequences_bring_their_share() -> None:
    recent = RecentDrafts(2)
    note(recent, [Candidate((0.8, 0.4)), Candidate((0.6, 0.2))] * 2)
    pool = recent.pools((2,), [0.5] * 2, 0.0, ANYONE)[2]
    assert pool.brought(np.array([2.0]), 2)[0] == pytest.approx(0.8 + 0.6)
    assert pool.brought(np.array([1.0, 4.0]), 2) == pytest.approx((0.8, 0.8 + 0.6 + 0.4 + 0.2))


def test_a_draft_that_was_less_deep_goes_on_at_the_usual_rates() -> None:
    recent = RecentDrafts(3)
    note(recent, [Candidate((0.8,))])
    pool = recent.pools((3,), [0.9, 0.5, 0.25], 0.0, ANYONE)[3]
    assert np.diff(pool.tokens) == pytest.approx((0.8, 0.4, 0.1))


def test_texts_cost_the_network_no_step_and_are_known_alone() -> None:
    recent = RecentDrafts(3)
    assert not recent.knows_texts
    note(recent, [Candidate((0.9, 0.8, 0.7), of_text=True), Candidate((0.5,))])
    assert recent.pools((1,), [0.5] * 3, 0.0, ANYONE)[1].asked == 0.5
    assert np.diff(recent.pools((1,), [0.5] * 3, 0.0, ANYONE)[1].tokens) == pytest.approx((0.9, 0.8, 0.7, 0.5))
    assert np.diff(recent.text_pool(ANYONE).tokens) == pytest.approx((0.9, 0.8, 0.7))
    assert recent.text_pool(ANYONE).num_drafts == 2


def test_the_network_stops_once_no_sequence_is_worth_a_step() -> None:
    """Of two drafts one is worth going on with after its first step: of two sequences one is, three times in four."""
    recent = RecentDrafts(3)
    note(recent, [Candidate((0.9, 0.8, 0.1)), Candidate((0.3, 0.2, 0.1))])
    pool = recent.pools((3,), [0.5] * 3, 0.5, ANYONE)[3]
    goes_on = [[True, True], [False, False]]  # after steps 1 and 2
    enumerated = [
        1 + sum(any(goes_on[each][step] for each in pair) for step in range(2)) for pair in product(range(2), repeat=2)
    ]
    assert pool.steps(2, 3) == pytest.approx(sum(enumerated) / len(enumerated))
    assert pool.steps(1, 1) == 1.0


def test_old_drafts_are_forgotten() -> None:
    recent = RecentDrafts(1)
    for _ in range(KEPT_DRAFTS):
        note(recent, [Candidate((0.1,))])
    for _ in range(KEPT_DRAFTS):
        note(recent, [Candidate((0.9,))])
    pool = recent.pools((1,), [0.5], 0.0, ANYONE)[1]
    assert pool.tokens[-1] == pytest.approx(0.9 * pool.num_drafts)


def test_who_still_runs_is_judged_by_own_drafts_once_there_are_some() -> None:
    """Of a batch in which the sequences with good drafts have ended, the rest bring what the rest brought."""
    recent = RecentDrafts(1)
    for _ in range(3):
        note(recent, [Candidate((0.9,), of_text=True), Candidate((0.2,), of_text=True)])
    assert recent.text_pool([1]).tokens[-1] == pytest.approx(3 * (0.9 + 0.2)), "three drafts say too little"
    note(recent, [Candidate((0.2,), of_text=True)], first_key=1)
    assert recent.text_pool([1]).num_drafts == 4
    assert recent.text_pool([1]).tokens[-1] == pytest.approx(4 * 0.2)
    assert recent.text_pool([7]).num_drafts == 7, "of a sequence that just came nothing is known"


def test_a_networks_drafts_are_judged_by_sequence_too() -> None:
    recent = RecentDrafts(1)
    for _ in range(4):
        note(recent, [Candidate((0.9,)), Candidate((0.2,))])
    assert recent.pools((1,), [0.5], 0.0, [0])[1].tokens[-1] == pytest.approx(4 * 0.9)
    assert recent.pools((1,), [0.5], 0.0, [0, 1])[1].tokens[-1] == pytest.approx(4 * (0.9 + 0.2))
