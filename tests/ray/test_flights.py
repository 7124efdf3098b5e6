"""Every sample is given out once and whole, whatever becomes of the engines that it was on."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.dispatch import Dispatcher
from rollout.in_flight import Flight, Flights
from rollout.partial_samples import as_begun
from slime_spec.types import GeneratedSample, GroupRequest, SamplingParams

NUM_TOKENS = 6


def group(name: str, num_samples: int) -> GroupRequest:
    seeds = tuple(100 * int(name) + index for index in range(num_samples))
    return GroupRequest(name, (1, 2), seeds, SamplingParams(max_new_tokens=NUM_TOKENS))


def generated(request: GroupRequest, index: int, num_new: int) -> GeneratedSample:
    """What an engine makes of a sample with ``num_new`` tokens more: token t of seed s is 10 * s + t."""
    position = request.sample_indices.index(index)
    begun = as_begun(request, position)
    num_tokens = min(NUM_TOKENS, len(begun.token_ids) + num_new)
    token_ids = tuple(10 * request.seeds[position] + t for t in range(num_tokens))
    assert token_ids[: len(begun.token_ids)] == begun.token_ids
    reason = "length" if num_tokens == NUM_TOKENS else "abort"
    return replace(begun, token_ids=token_ids, logprobs=(-1.0,) * num_tokens, finish_reason=reason)  # type: ignore[arg-type]


def flights_of(requests: list[GroupRequest], serving: list[bool], room: int = 100) -> Flights:
    return Flights(requests, Dispatcher(serving, room), count())


def land(flights: Flights, flight: Flight, num_new: int) -> list[GeneratedSample]:
    """All that is out of a flight comes back, with as many tokens more."""
    given_out = [flights.arrived(flight, generated(flight.request, index, num_new)) for index in list(flight.left)]
    return [sample for sample in given_out if sample is not None] + flights.ended(flight)


def test_what_an_engine_that_ceased_to_serve_had_begun_goes_on_at_one_that_serves() -> None:
    serving = [True, True]
    flights = flights_of([group("1", 3), group("2", 3)], serving)
    first, second = flights.launch()
    assert (first.engine, second.engine) == (0, 1)
    assert flights.arrived(first, generated(first.request, 1, NUM_TOKENS)) is not None
    serving[0] = False
    assert flights.recall() == [first]
    assert flights.recall() == []
    assert land(flights, first, 2) == []
    (again,) = flights.launch()
    assert (again.engine, again.request.seeds) == (1, (100, 102))
    assert [(each.sample_index, each.token_ids) for each in again.request.begun] == [
        (0, (1000, 1001)),
        (2, (1020, 1021)),
    ]
    finished = land(flights, again, 99)
    assert [(each.sample_index, len(each.token_ids), each.finish_reason) for each in finished] == [
        (0, NUM_TOKENS, "length"),
        (2, NUM_TOKENS, "length"),
    ]


def test_where_no_engine_serves_samples_stay_where_they_are() -> None:
    serving = [True, True]
    flights = flights_of([group("1", 1), group("2", 1), group("3", 1)], serving, room=1)
    flights.launch()
    serving[:] = [False, False]
    assert (flights.recall(), flights.launch()) == ([], [])
    serving[1] = True
    assert [flight.engine for flight in flights.recall()] == [0]


def test_the_samples_of_a_process_that_died_begin_as_they_were_when_it_got_them() -> None:
    serving = [True, True]
    flights = flights_of([group("1", 3)], serving)
    (first,) = flights.launch()
    serving[0] = False
    flights.recall()
    land(flights, first, 2)
    (second,) = flights.launch()
    flights.arrived(second, generated(second.request, 2, NUM_TOKENS))
    serving[:] = [True, False]
    assert flights.lost(second) == []
    (third,) = flights.launch()
    assert third.request.seeds == (100, 101)
    assert [each.token_ids for each in third.request.begun] == [(1000, 1001), (1010, 1011)]


def test_a_sample_that_breaks_off_again_and_again_without_a_token_is_an_error() -> None:
    serving = [True, True]
    flights = flights_of([group("1", 1)], serving)
    for attempt, num_new in enumerate((0, 0, 1, 0, 0)):  # a token in between begins the count anew
        (flight,) = flights.launch()
        assert flight.engine == attempt % 2
        serving[:] = [flight.engine == 1, flight.engine == 0]
        flights.recall()
        land(flights, flight, num_new)
    (flight,) = flights.launch()
    serving[:] = [flight.engine == 1, flight.engine == 0]
    flights.recall()
    with pytest.raises(RuntimeError, match="1: sample 0 was broken off 3 times without a token"):
        land(flights, flight, 0)


def test_an_abort_gives_out_what_waits_and_what_comes_back_as_it_is() -> None:
    serving = [True, True]
    flights = flights_of([group("1", 2), group("2", 2), group("3", 2)], serving, room=2)
    first, second = flights.launch()
    serving[0] = False
    flights.recall()
    flights.arrived(first, generated(first.request, 0, 3))
    waiting = flights.abort()
    assert [(each.group_id, each.sample_index, each.token_ids) for each in waiting] == [("3", 0, ()), ("3", 1, ())]
    given_out = land(flights, first, 1) + land(flights, second, 2)
    assert sorted((each.group_id, each.sample_index, len(each.token_ids)) for each in given_out) == [
        *(("1", 0, 3), ("1", 1, 1), ("2", 0, 2), ("2", 1, 2))
    ]
    assert {each.finish_reason for each in waiting + given_out} == {"abort"}
    assert not flights.has_unfinished


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_engines_do_every_sample_comes_out_once_and_whole(data: st.DataObject) -> None:
    num_engines = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    serving = [True] * num_engines
    requests = [group(str(index), size) for index, size in enumerate(sizes)]
    flights = flights_of(requests, serving, data.draw(st.integers(1, 8)))
    given_out: list[GeneratedSample] = []
    num_events = 0
    while flights.has_unfinished:
        num_events += 1
        if num_events < 60:
            serving[:] = data.draw(st.lists(st.booleans(), min_size=num_engines, max_size=num_engines))
        else:
            serving[:] = [True] * num_engines
        flights.launch()
        flights.recall()
        for flight in flights.in_air:
            happens = data.draw(st.sampled_from(["nothing", "finishes", "dies"])) if num_events < 60 else "finishes"
            if happens == "finishes" or flight.is_recalled:
                given_out += land(flights, flight, data.draw(st.integers(1, 3)) if flight.is_recalled else NUM_TOKENS)
            elif happens == "dies" and num_events < 3:  # three times without a token are an error
                given_out += flights.lost(flight)
    keys = sorted((int(each.group_id), each.sample_index) for each in given_out)
    assert keys == [(number, index) for number, size in enumerate(sizes) for index in range(size)]
    for sample in given_out:
        seed = 100 * int(sample.group_id) + sample.sample_index
        assert sample.token_ids == tuple(10 * seed + t for t in range(NUM_TOKENS))
        assert len(sample.logprobs) == NUM_TOKENS
