"""Groups go to the least loaded engine that serves and has room."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.dispatch import Dispatcher


def test_the_least_loaded_engine_is_chosen():
    dispatcher = Dispatcher([True] * 3, samples_per_engine=10)
    assert [dispatcher.assign(n) for n in (4, 2, 3, 1)] == [0, 1, 2, 1]


def test_a_full_pool_waits_until_samples_finish():
    dispatcher = Dispatcher([True], samples_per_engine=4)
    assert dispatcher.assign(3) == 0
    assert dispatcher.assign(2) is None
    dispatcher.finished(0)
    assert dispatcher.assign(2) == 0


def test_a_group_larger_than_the_limit_still_runs_on_an_idle_engine():
    assert Dispatcher([True], samples_per_engine=4).assign(9) == 0


def test_an_engine_that_does_not_serve_gets_nothing_until_it_does():
    serving = [False, True]
    dispatcher = Dispatcher(serving, samples_per_engine=4)
    assert [dispatcher.assign(2) for _ in range(3)] == [1, 1, None]
    serving[0] = True
    assert dispatcher.assign(2) == 0
    serving[:] = [False, False]
    assert dispatcher.assign(1) is None


@given(st.lists(st.integers(1, 6), max_size=40), st.integers(1, 4))
def test_every_group_is_placed_in_the_end_and_loads_differ_by_at_most_one_group(sizes, num_engines):
    dispatcher = Dispatcher([True] * num_engines, samples_per_engine=10**6)
    placed = [dispatcher.assign(size) for size in sizes]
    assert None not in placed
    assert sum(dispatcher.owed) == sum(sizes)
    assert max(dispatcher.owed) - min(dispatcher.owed) <= max(sizes, default=0)


def least_loaded(owed: list[int], serving: list[bool], room: int, num_samples: int) -> int | None:
    """The slow reference: a minimum over all loads."""
    serve = [engine for engine, serves in enumerate(serving) if serves]
    if not serve:
        return None
    engine = min(serve, key=owed.__getitem__)
    return None if owed[engine] and owed[engine] + num_samples > room else engine


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_the_heap_of_loads_chooses_what_a_minimum_over_all_loads_does(data: st.DataObject):
    num_engines, room = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    serving = data.draw(st.lists(st.booleans(), min_size=num_engines, max_size=num_engines))
    dispatcher, owed = Dispatcher(serving, room), [0] * num_engines
    for _ in range(data.draw(st.integers(1, 60))):
        happens = data.draw(st.sampled_from(["assign", "finished", "serves or not"]))
        engine = data.draw(st.integers(0, num_engines - 1))
        if happens == "assign":
            num_samples = data.draw(st.integers(1, 5))
            chosen = least_loaded(owed, serving, room, num_samples)
            assert dispatcher.assign(num_samples) == chosen
            if chosen is not None:
                owed[chosen] += num_samples
        elif happens == "finished" and owed[engine]:
            num_samples = data.draw(st.integers(1, owed[engine]))
            dispatcher.finished(engine, num_samples)
            owed[engine] -= num_samples
        elif happens == "serves or not":
            serving[engine] = not serving[engine]
        assert dispatcher.owed == owed
        num_idle = sum(serving[e] and not owed[e] for e in range(num_engines))
        least = data.draw(st.integers(0, num_engines))
        assert dispatcher.num_idle_over(least) == (num_idle if num_idle > least else 0)


def test_the_heap_stays_as_small_as_the_pool_while_samples_finish_and_no_group_is_left():
    dispatcher = Dispatcher([True] * 4, samples_per_engine=10**6)
    for _ in range(4):
        dispatcher.assign(1000)
    for number in range(4000):
        dispatcher.finished(number % 4)
    assert len(dispatcher._loads) <= 16
    assert dispatcher.assign(1) == 0
