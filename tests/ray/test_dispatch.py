"""Groups go to the least loaded engine that serves and has room."""

from hypothesis import given
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
