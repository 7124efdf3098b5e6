"""The coordinator's samples, waits and reports, over fake engines in this process."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.coordinator import Call, Coordinator, EngineProcessDied, PendingCalls
from rollout.fake import FakeGeneration
from rollout.fake_calls import FakeCalls
from slime_spec.request_feed import FeedClosed, RequestFeed
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest, SamplingParams

Key = tuple[str, int]


def requests(num_groups: int, num_samples: int = 3) -> list[GroupRequest]:
    params = SamplingParams(max_new_tokens=9)
    return [
        GroupRequest(str(g), (1, 2), tuple(100 * g + i for i in range(num_samples)), params) for g in range(num_groups)
    ]


def whole(asked: Sequence[GroupRequest]) -> dict[Key, tuple[int, ...]]:
    """Every sample's tokens, as one engine makes them without a coordinator."""
    return {(each.group_id, each.sample_index): each.token_ids for r in asked for each in FakeGeneration(r, 0, 0)}


def tokens_of(samples: Sequence[GeneratedSample]) -> dict[Key, tuple[int, ...]]:
    tokens = {(each.group_id, each.sample_index): each.token_ids for each in samples}
    assert len(tokens) == len(samples), "a sample came twice"
    return tokens


@given(st.integers(1, 5), st.integers(1, 9), st.none() | st.just(1), st.integers(1, 6), st.integers(1, 7))
def test_samples_are_the_same_for_any_number_of_engines_with_and_without_splitting(
    num_groups: int, num_engines: int, least_part: int | None, num_samples: int, at_once: int
) -> None:
    asked = requests(num_groups, num_samples)
    calls = FakeCalls(num_engines, at_once)
    samples = list(Coordinator(calls, num_engines, 8, least_part).generate(asked))
    assert tokens_of(samples) == whole(asked)
    assert {each.finish_reason for each in samples} == {"stop"}
    num_used = min(num_engines, num_groups if least_part is None else num_groups * num_samples)
    assert len({engine for engine, _ in calls.sent}) == num_used


class CheckedCalls(FakeCalls):
    """Checks that what an engine hears of was said by a sample of the group elsewhere, and is new to it."""

    def __init__(self, num_engines: int, *arguments: Any, asked: Sequence[GroupRequest]) -> None:
        super().__init__(num_engines, *arguments)
        self._whole = whole(asked)
        self.known: dict[tuple[int, int], set[int]] = {}  # sample indices, by engine and group in flight
        self._group_ids: dict[tuple[int, int], str] = {}

    def generate(self, engine: int, request: GroupRequest, number: int) -> Call:
        self._check(request.group_id, request.earlier)
        self.known[engine, number] = {*request.sample_indices, *(each.sample_index or 0 for each in request.earlier)}
        self._group_ids[engine, number] = request.group_id
        return super().generate(engine, request, number)

    def share(self, engine: int, replies: Mapping[int, Sequence[EarlierReply]]) -> None:
        for number, heard in replies.items():
            assert (engine, number) in self._open, "it runs no longer"
            indices = {each.sample_index or 0 for each in heard}
            assert len(indices) == len(heard) > 0
            assert not indices & self.known[engine, number]
            self.known[engine, number] |= indices
            self._check(self._group_ids[engine, number], heard)
        super().share(engine, replies)

    def _check(self, group_id: str, replies: Sequence[EarlierReply]) -> None:
        assert all(each.token_ids == self._whole[group_id, each.sample_index or 0] for each in replies)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_engines_do_and_whenever_every_sample_comes_out_once_and_whole(data: st.DataObject) -> None:
    num_engines, num_groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    num_events, num_replacements = 0, data.draw(st.integers(0, 1))
    killed: list[int] = []

    def happen() -> None:
        nonlocal num_events
        num_events += 1
        if num_events > 40:
            for engine in range(1, num_engines):
                if engine not in calls._dead:
                    calls.set_serving(engine, True)
            return
        engine = data.draw(st.integers(0, num_engines - 1))
        if engine and engine not in calls._dead:  # the first always serves
            happens = data.draw(st.sampled_from(["nothing", "serves", "does not serve", "dies"]))
            if happens == "dies" and len(killed) < (
                1 if num_replacements else 2
            ):  # three times without a token are an error
                killed.append(engine)
                calls.kill(engine)
            elif "serve" in happens:
                calls.set_serving(engine, happens == "serves")

    asked = requests(num_groups)
    calls = CheckedCalls(
        num_engines, data.draw(st.integers(1, 6)), happen, FakeGeneration, num_replacements, asked=asked
    )
    coordinator = Coordinator(
        calls,
        num_engines,
        data.draw(st.integers(1, 9)),
        data.draw(st.none() | st.integers(1, 3)),
        data.draw(st.booleans()),
    )
    assert tokens_of(list(coordinator.generate(asked))) == whole(asked)
    if len(killed) <= num_replacements:
        assert tokens_of(list(coordinator.generate(asked[:2]))) == whole(asked[:2])


def test_a_sample_that_finishes_reaches_the_engines_that_run_others_of_its_group_once_a_wait_and_no_others() -> None:
    """Engines 0 and 1 share a group of four samples, engine 2 has one alone; a wait finds a sample of each."""
    asked = [*requests(1, num_samples=4), GroupRequest("9", (3,), (900,), SamplingParams(max_new_tokens=9))]
    calls = CheckedCalls(3, 3, asked=asked)
    samples = list(Coordinator(calls, 3, 8, least_part=2, shares_replies=True).generate(asked))
    assert tokens_of(samples) == whole(asked)
    heard = [
        (engine, sorted(each.sample_index or 0 for each in told))
        for engine, replies in calls.shared
        for told in replies.values()
    ]
    parts = [request.sample_indices for _, request in calls.sent[:2]]
    assert sorted(parts) == [(0, 2), (1, 3)]
    assert sorted(heard) == [(0, [parts[1][0]]), (1, [parts[0][0]])], (
        "each part's first; of its last nobody needs to hear"
    )


@pytest.mark.parametrize(
    ("shares_replies", "least_part"), [(True, None), (False, 1)], ids=["groups are whole", "engines read no texts"]
)
def test_nothing_is_shared_where_no_engine_would_draft_from_it(shares_replies: bool, least_part: int | None) -> None:
    calls = FakeCalls(4, 4)
    list(Coordinator(calls, 4, 8, least_part, shares_replies).generate(requests(3, num_samples=4)))
    assert calls.shared == []


def test_an_aborted_generation_shares_nothing_more() -> None:
    calls = FakeCalls(2)
    coordinator = Coordinator(calls, 2, 8, least_part=1, shares_replies=True)
    samples = coordinator.generate(requests(1, num_samples=6))
    next(samples)
    coordinator.abort()
    list(samples)
    assert sum(len(told) for _, replies in calls.shared for told in replies.values()) <= 1


def test_one_wait_gives_all_samples_that_are_ready() -> None:
    calls = FakeCalls(num_engines=16, num_at_once=64)
    samples = list(Coordinator(calls, 16, 16).generate(requests(16, num_samples=4)))
    assert len(samples) == 64
    assert calls.num_waits <= 8, "at the start, four times a sample of each stream, and the ends"


def test_an_abort_is_noticed_among_the_samples_of_one_wait_and_every_sample_comes_out() -> None:
    calls = FakeCalls(num_engines=2, num_at_once=64)
    coordinator = Coordinator(calls, 2, samples_per_engine=6)
    asked = requests(8)
    samples: list[GeneratedSample] = []
    for sample in coordinator.generate(asked):
        samples.append(sample)
        if len(samples) == 2:
            coordinator.abort()
    reasons = Counter(each.finish_reason for each in samples)
    assert reasons == {"stop": 2, "abort": 22}
    parts = tokens_of(samples)
    assert parts.keys() == whole(asked).keys()
    assert all(tokens[: len(parts[key])] == parts[key] for key, tokens in whole(asked).items())
    assert sum(bool(tokens) for tokens in parts.values()) > 2, "samples in progress come out with their tokens"
    assert tokens_of(list(coordinator.generate(asked))) == whole(asked)


def test_no_request_of_a_feed_is_generated_after_an_abort_however_the_two_fall_together() -> None:
    """The abort comes while requests are taken; the reader asks for another turn as soon as a sample arrives."""
    first, second = requests(2, num_samples=1)
    aborts = [lambda: coordinator.abort()]
    feed = RequestFeed(lambda: aborts.pop()() if aborts else None)
    coordinator = Coordinator(FakeCalls(1), 1, 8)
    feed.put(first)
    reasons = []
    for sample in coordinator.generate(feed):
        reasons.append((sample.group_id, sample.finish_reason))
        with suppress(FeedClosed):
            if sample.group_id == first.group_id:
                feed.put(second)
    assert ("1", "stop") not in reasons
    assert not feed.has_more


def test_engines_that_stop_serve_again_and_die_are_told_once_each(caplog: pytest.LogCaptureFixture) -> None:
    waits = {3: lambda: calls.set_serving(1, False), 6: lambda: calls.set_serving(1, True), 9: lambda: calls.kill(0)}
    calls = FakeCalls(2, on_wait=lambda: waits.pop(calls.num_waits, lambda: None)())
    asked = requests(12)
    with caplog.at_level(logging.WARNING):
        samples = list(Coordinator(calls, 2, 6).generate(asked))
    assert tokens_of(samples) == whole(asked)
    told = [(record.levelname, record.getMessage().partition(" error=")[0]) for record in caplog.records]
    assert told == [
        ("WARNING", "engine lost its server engine=1"),
        ("WARNING", "engine serves again engine=1"),
        ("ERROR", "engine process died, others take over its samples engine=0"),
    ]
    assert samples[-1].engine == 1


def test_without_an_engine_left_the_generation_ends_with_the_last_death() -> None:
    waits = {4: lambda: (calls.kill(0), calls.kill(1))}
    calls = FakeCalls(2, on_wait=lambda: waits.pop(calls.num_waits, lambda: None)())
    coordinator = Coordinator(calls, 2, 6)
    with pytest.raises(EngineProcessDied, match=r"no engine is left.*engine [01] was killed"):
        list(coordinator.generate(requests(4)))
    with pytest.raises(
        EngineProcessDied, match=r"max-engine-restarts-per-hour\); the last one died so: engine [01] was killed"
    ):
        list(coordinator.generate(requests(1)))


def test_a_lone_engine_that_dies_is_replaced_and_the_generation_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    waits = {4: lambda: calls.kill(0), 9: lambda: calls.kill(0)}
    calls = FakeCalls(1, on_wait=lambda: waits.pop(calls.num_waits, lambda: None)(), num_replacements=2)
    asked = requests(6)
    with caplog.at_level(logging.WARNING):
        assert tokens_of(list(Coordinator(calls, 1, 6).generate(asked))) == whole(asked)
    told = [record.getMessage().partition(" error=")[0] for record in caplog.records]
    died = "engine process died, others take over its samples engine=0"
    assert told == [died, "engine is started anew engine=0", "engine was replaced engine=0"] * 2


class SlowCalls(FakeCalls):
    """Replaced engines take the weights only when they may; ``refusals`` of them do not take them at all."""

    may_join = False
    refusals = 0

    def join(self, engine: int, start: Call) -> bool:
        if self.refusals:
            self.refusals -= 1
            raise EngineProcessDied("it did not take the weights")
        return self.may_join and super().join(engine, start)


def test_a_replaced_engine_gets_groups_once_it_has_the_weights_that_others_serve() -> None:
    calls = SlowCalls(2, on_wait=lambda: calls.kill(0) if calls.num_waits == 4 else None, num_replacements=1)
    coordinator = Coordinator(calls, 2, 6)
    for may_join in (False, False, True):
        calls.may_join, calls.sent = may_join, []
        asked = requests(8)
        assert tokens_of(list(coordinator.generate(asked))) == whole(asked)
        assert coordinator.living == ([0, 1] if may_join else [1])
        if calls.num_waits > 40:
            assert {engine for engine, _ in calls.sent} == set(coordinator.living)


def test_where_the_last_engine_waits_for_weights_the_generation_ends() -> None:
    calls = SlowCalls(1, on_wait=lambda: calls.kill(0) if calls.num_waits == 4 else None, num_replacements=1)
    with pytest.raises(EngineProcessDied, match=r"no engine is left that may serve.*--update-weights-interval"):
        list(Coordinator(calls, 1, 6).generate(requests(8)))


def test_a_process_that_does_not_take_the_weights_is_replaced_as_well() -> None:
    calls = SlowCalls(1, on_wait=lambda: calls.kill(0) if calls.num_waits == 4 else None, num_replacements=3)
    calls.refusals, calls.may_join = 2, True
    asked = requests(8)
    assert tokens_of(list(Coordinator(calls, 1, 6).generate(asked))) == whole(asked)


def test_an_engine_that_died_between_generations_is_replaced_when_the_next_begins() -> None:
    calls = FakeCalls(2, num_replacements=1)
    coordinator = Coordinator(calls, 2, 6)
    calls.kill(1)
    coordinator.bury(1, EngineProcessDied("in a push"))
    assert coordinator.living == [0]
    assert tokens_of(list(coordinator.generate(requests(8)))) == whole(requests(8))
    assert coordinator.living == [0, 1]


def test_what_an_abandoned_generation_left_on_engines_is_not_waited_for_by_the_next() -> None:
    calls = FakeCalls(2, num_at_once=1)
    coordinator = Coordinator(calls, 2, 100)
    next(coordinator.generate(requests(4)))
    assert tokens_of(list(coordinator.generate(requests(3)))) == whole(requests(3))


@given(st.lists(st.integers(0, 9), max_size=40))
def test_pending_calls_are_those_that_were_added_and_not_removed(numbers: list[int]) -> None:
    pending, expected = PendingCalls(), set()
    for number in numbers:
        if number in expected:
            pending.remove(number)
            expected.remove(number)
        else:
            pending.add(number)
            expected.add(number)
        assert sorted(pending.calls) == sorted(expected)
