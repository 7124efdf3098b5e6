"""A split group's samples are the group's, in as even parts as can be."""

from __future__ import annotations

from itertools import combinations_with_replacement

from hypothesis import given
from hypothesis import strategies as st

from rollout.fake import FakeGeneration
from rollout.split import divided, part_of
from slime_spec.types import GroupRequest, SamplingParams


def group(name: str, num_samples: int) -> GroupRequest:
    seeds = tuple(100 * int(name) + index for index in range(num_samples))
    return GroupRequest(name, (1, 2), seeds, SamplingParams(max_new_tokens=7))


def test_groups_stay_as_they_are_where_there_are_as_many_as_engines() -> None:
    groups = [group("1", 4), group("2", 4)]
    assert divided(groups, 2, 1) == groups
    assert divided(groups, 1, 1) == groups


def test_no_part_is_smaller_than_what_an_engine_decodes_in_the_time_of_one_sample() -> None:
    assert [len(part.seeds) for part in divided([group("1", 15)], 3)] == [15]
    assert [len(part.seeds) for part in divided([group("1", 16)], 3)] == [8, 8]
    assert [len(part.seeds) for part in divided([group("1", 9), group("2", 34)], 9)] == [9, 9, 9, 8, 8]


def test_one_group_over_three_engines() -> None:
    parts = divided([group("3", 8)], 3, least_part=1)
    assert [part.sample_indices for part in parts] == [(0, 3, 6), (1, 4, 7), (2, 5)]
    assert [part.seeds for part in parts] == [(300, 303, 306), (301, 304, 307), (302, 305)]


def test_a_part_of_a_part_resumes_the_partial_samples_that_it_had() -> None:
    whole = group("1", 3)
    rest = part_of(whole, (0, 2))
    cut = FakeGeneration(rest, 0, 4)
    cut.abort()
    partials = list(cut)
    assert any(partial.token_ids for partial in partials)
    again = GroupRequest("1", (1, 2), rest.seeds, rest.params, tuple(partials))
    (one, other) = divided([again], 2, 1)
    assert (one.partials, other.partials) == ((partials[0],), (partials[1],))
    assert (one.seeds, other.seeds) == ((100,), (102,))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 4))
def test_the_largest_part_is_as_small_as_any_division_makes_it(
    sizes: list[int], num_engines: int, least_part: int
) -> None:
    parts = divided([group(str(n + 1), size) for n, size in enumerate(sizes)], num_engines, least_part)
    assert len(parts) <= max(num_engines, len(sizes))
    assert all(len(part.seeds) >= least_part for part in parts if part.partials)
    keys = [(part.group_id, index) for part in parts for index in part.sample_indices]
    assert sorted(keys) == [(str(n + 1), index) for n, size in enumerate(sizes) for index in range(size)]
    every = [
        max(-(-size // num) for size, num in zip(sizes, nums, strict=True))
        for nums in _numbers_of_parts(len(sizes), max(num_engines, len(sizes)))
        if all(num == 1 or size // num >= least_part for size, num in zip(sizes, nums, strict=True))
    ]
    assert max(len(part.seeds) for part in parts) == min(every)


def _numbers_of_parts(num_groups: int, num_engines: int) -> list[tuple[int, ...]]:
    """Every way to give each group at least one engine and all groups together at most ``num_engines``."""
    ends = combinations_with_replacement(range(num_engines - num_groups + 1), num_groups)
    return [tuple(1 + b - a for a, b in zip((0, *way), way, strict=False)) for way in ends]


@given(st.integers(1, 8), st.integers(1, 8))
def test_the_parts_make_the_samples_of_the_whole_group(num_samples: int, num_engines: int) -> None:
    whole = group("5", num_samples)
    expected = {sample.sample_index: sample for sample in FakeGeneration(whole, 0, 3)}
    made = {
        sample.sample_index: sample
        for part in divided([whole], num_engines, 1)
        for sample in FakeGeneration(part, 0, 3)
    }
    assert made == expected
