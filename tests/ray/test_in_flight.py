"""Every sample is given out once and whole, whatever becomes of the engines that it was on."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.dispatch import Dispatcher
from rollout.in_flight import InFlightGroup, InFlightGroups
from rollout.split import part_of
from slime_spec.partial_samples import as_partial
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams

NUM_TOKENS = 6


def group(name: str, num_samples: int) -> GroupRequest:
    seeds = tuple(100 * int(name) + index for index in range(num_samples))
    return GroupRequest(name, (1, 2), seeds, SamplingParams(max_new_tokens=NUM_TOKENS))


def generated(request: GroupRequest, index: int, num_new: int) -> GeneratedSample:
    """What an engine makes of a sample with ``num_new`` tokens more: token t of seed s is 10 * s + t."""
    position = request.sample_indices.index(index)
    partial = as_partial(request, position)
    num_tokens = min(NUM_TOKENS, len(partial.token_ids) + num_new)
    token_ids = tuple(10 * request.seeds[position] + t for t in range(num_tokens))
    assert token_ids[: len(partial.token_ids)] == partial.token_ids
    reason = "length" if num_tokens == NUM_TOKENS else "abort"
    return replace(partial, token_ids=token_ids, logprobs=(-1.0,) * num_tokens, finish_reason=reason)  # type: ignore[arg-type]


def in_flight(requests: list[GroupRequest], serving: list[bool], room: int = 100) -> InFlightGroups:
    return InFlightGroups(requests, Dispatcher(serving, room), count())


def land(groups: InFlightGroups, sent: InFlightGroup, num_new: int) -> list[GeneratedSample]:
    """All samples that a group has out come back, with as many tokens more."""
    given_out = [groups.arrived(sent, generated(sent.request, index, num_new)) for index in list(sent.left)]
    return [sample for sample in given_out if sample is not None] + groups.ended(sent)


def test_samples_of_an_engine_that_ceased_to_serve_are_resumed_on_an_engine_that_serves() -> None:
    serving = [True, True]
    groups = in_flight([group("1", 3), group("2", 3)], serving)
    first, second = groups.launch()
    assert (first.engine, second.engine) == (0, 1)
    assert groups.arrived(first, generated(first.request, 1, NUM_TOKENS)) is not None
    serving[0] = False
    assert groups.recall() == [first]
    assert groups.recall() == []
    assert land(groups, first, 2) == []
    (again,) = groups.launch()
    assert (again.engine, again.request.seeds) == (1, (100, 102))
    assert [(each.sample_index, each.token_ids) for each in again.request.partials] == [
        (0, (1000, 1001)),
        (2, (1020, 1021)),
    ]
    finished = land(groups, again, 99)
    assert [(each.sample_index, len(each.token_ids), each.finish_reason) for each in finished] == [
        (0, NUM_TOKENS, "length"),
        (2, NUM_TOKENS, "length"),
    ]


def test_where_no_engine_serves_samples_stay_where_they_are() -> None:
    serving = [True, True]
    groups = in_flight([group("1", 1), group("2", 1), group("3", 1)], serving, room=1)
    groups.launch()
    serving[:] = [False, False]
    assert (groups.recall(), groups.launch()) == ([], [])
    serving[1] = True
    assert [sent.engine for sent in groups.recall()] == [0]


def test_the_samples_of_a_process_that_died_begin_as_they_were_when_it_got_them() -> None:
    serving = [True, True]
    groups = in_flight([group("1", 3)], serving)
    (first,) = groups.launch()
    serving[0] = False
    groups.recall()
    land(groups, first, 2)
    (second,) = groups.launch()
    groups.arrived(second, generated(second.request, 2, NUM_TOKENS))
    serving[:] = [True, False]
    assert groups.lost(second) == []
    (third,) = groups.launch()
    assert third.request.seeds == (100, 101)
    assert [each.token_ids for each in third.request.partials] == [(1000, 1001), (1010, 1011)]


def test_a_sample_that_breaks_off_again_and_again_without_a_token_is_an_error() -> None:
    serving = [True, True]
    groups = in_flight([group("1", 1)], serving)
    for attempt, num_new in enumerate((0, 0, 1, 0, 0)):  # a token in between begins the count anew
        (sent,) = groups.launch()
        assert sent.engine == attempt % 2
        serving[:] = [sent.engine == 1, sent.engine == 0]
        groups.recall()
        land(groups, sent, num_new)
    (sent,) = groups.launch()
    serving[:] = [sent.engine == 1, sent.engine == 0]
    groups.recall()
    with pytest.raises(RuntimeError, match="1: sample 0 was broken off 3 times without a token"):
        land(groups, sent, 0)


def test_an_abort_gives_out_what_waits_and_what_comes_back_as_it_is() -> None:
    serving = [True, True]
    groups = in_flight([group("1", 2), group("2", 2), group("3", 2)], serving, room=2)
    first, second = groups.launch()
    serving[0] = False
    groups.recall()
    groups.arrived(first, generated(first.request, 0, 3))
    waiting = groups.abort()
    assert [(each.group_id, each.sample_index, each.token_ids) for each in waiting] == [("3", 0, ()), ("3", 1, ())]
    given_out = land(groups, first, 1) + land(groups, second, 2)
    assert sorted((each.group_id, each.sample_index, len(each.token_ids)) for each in given_out) == [
        *(("1", 0, 3), ("1", 1, 1), ("2", 0, 2), ("2", 1, 2))
    ]
    assert {each.finish_reason for each in waiting + given_out} == {"abort"}
    assert not groups.has_unfinished


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_engines_do_every_sample_comes_out_once_and_whole(data: st.DataObject) -> None:
    num_engines = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    serving = [True] * num_engines
    requests = [group(str(index), size) for index, size in enumerate(sizes)]
    groups = in_flight(requests, serving, data.draw(st.integers(1, 8)))
    given_out: list[GeneratedSample] = []
    num_events = 0
    while groups.has_unfinished:
        num_events += 1
        if num_events < 60:
            serving[:] = data.draw(st.lists(st.booleans(), min_size=num_engines, max_size=num_engines))
        else:
            serving[:] = [True] * num_engines
        groups.launch()
        groups.recall()
        for sent in groups.on_engines:
            happens = data.draw(st.sampled_from(["nothing", "finishes", "dies"])) if num_events < 60 else "finishes"
            if happens == "finishes" or sent.is_recalled:
                given_out += land(groups, sent, data.draw(st.integers(1, 3)) if sent.is_recalled else NUM_TOKENS)
            elif happens == "dies" and num_events < 3:  # three times without a token are an error
                given_out += groups.lost(sent)
    keys = sorted((int(each.group_id), each.sample_index) for each in given_out)
    assert keys == [(number, index) for number, size in enumerate(sizes) for index in range(size)]
    for sample in given_out:
        seed = 100 * int(sample.group_id) + sample.sample_index
        assert sample.token_ids == tuple(10 * seed + t for t in range(NUM_TOKENS))
        assert len(sample.logprobs) == NUM_TOKENS


@pytest.mark.parametrize("shares_replies", [False, True])
def test_what_finished_goes_with_later_requests_for_the_group_to_any_engine(shares_replies: bool) -> None:
    """One sample finishes before its engine ceases to serve, the other goes on at the engine of the group's rest."""
    serving = [True, True]
    whole = group("1", 4)
    parts = [part_of(whole, (0, 1)), part_of(whole, (2, 3)), group("2", 2)]
    groups = InFlightGroups(parts, Dispatcher(serving, 2), count(), shares_replies=shares_replies)
    first, second = groups.launch()
    assert first.request.earlier == second.request.earlier == ()
    finished = [groups.arrived(first, generated(first.request, 1, NUM_TOKENS))]
    serving[0] = False
    groups.recall()
    assert land(groups, first, 2) == []
    finished += land(groups, second, NUM_TOKENS)
    (again,) = groups.launch()
    assert again.request.sample_indices == (0,)
    shared = {each.sample_index: each.token_ids for each in again.request.earlier}
    expected = {each.sample_index: each.token_ids for each in finished if each is not None}
    assert sorted(expected) == [1, 2, 3]
    assert shared == (expected if shares_replies else {})
