"""Engines get the groups first that are expected to take longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapreplace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_spec.config.tree import Config, RolloutConfig
from slime_spec.interfaces import RunState
from slime_spec.rl.expected_length import ExpectedLengths, Lengths
from slime_spec.rl.open_group import OpenGroup
from slime_spec.rl.rollouts import GeneratedRollouts
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.types import GeneratedSample, GroupRequest, Prompt, Sample, SamplingParams


def prompt(prompt_id: int, text_id: int | None = None) -> Prompt:
    return Prompt(prompt_id, "task", "?", (1, prompt_id if text_id is None else text_id), "x")


def replies(name: int, lengths: Sequence[int], reason: str = "stop") -> list[GeneratedSample]:
    return [
        GeneratedSample(str(name), index, (5,) * length, (-1.0,) * length, reason, 0, 2)  # type: ignore[arg-type]
        for index, length in enumerate(lengths)
    ]


def open_group(prompt_id: int, partial: Sequence[int] = (), text_id: int | None = None) -> OpenGroup:
    asked = prompt(prompt_id, text_id)
    request = GroupRequest(str(prompt_id), asked.token_ids, (1, 2), SamplingParams())
    return OpenGroup(asked, request, partials=dict(enumerate(replies(prompt_id, partial, "abort"))))


def order(lengths: ExpectedLengths, *groups: OpenGroup) -> list[int]:
    return [group.prompt.prompt_id for group in lengths.longest_first(groups)]


def test_groups_of_which_nothing_is_known_stay_in_the_order_they_came_in() -> None:
    assert order(ExpectedLengths(), open_group(4), open_group(2), open_group(9)) == [4, 2, 9]


def test_a_prompt_is_expected_to_be_answered_as_at_length_as_in_the_epoch_before() -> None:
    lengths = ExpectedLengths()
    for text_id, num_tokens in ((1, 10), (2, 90), (3, 30)):
        lengths.note(prompt(text_id), replies(text_id, [num_tokens, num_tokens + 2]))
    unknown = open_group(9)  # 44 on the mean of all
    epoch = [open_group(10 + text_id, text_id=text_id) for text_id in (1, 2, 3)]
    assert order(lengths, *epoch, unknown) == [12, 9, 13, 11]


def test_the_last_group_of_a_prompt_counts_and_replies_that_an_engine_broke_off_do_not() -> None:
    lengths = ExpectedLengths()
    lengths.note(prompt(1), replies(1, [100]))
    lengths.note(prompt(2), replies(2, [50]))
    lengths.note(prompt(1), replies(1, [10]))
    lengths.note(prompt(1), replies(1, [900], "abort"))
    assert order(lengths, open_group(1), open_group(2)) == [2, 1]


def test_a_resumed_sample_is_expected_to_be_as_long_as_replies_that_came_further() -> None:
    lengths = ExpectedLengths()
    lengths.note(prompt(1), replies(1, [10, 10, 10, 200]))
    assert order(lengths, open_group(5), open_group(6, [20, 0])) == [6, 5], "180 more, against 57.5 on the mean"
    assert order(lengths, open_group(6, [190, 195]), open_group(5)) == [5, 6], "10 more"
    assert order(lengths, open_group(5), open_group(6, [300, 0])) == [6, 5], "longer than all: 300 more"


def test_only_so_many_prompts_are_remembered() -> None:
    lengths = ExpectedLengths(max_prompts=2, max_recent=1)
    for text_id, num_tokens in ((1, 90), (2, 60), (3, 30)):
        lengths.note(prompt(text_id), replies(text_id, [num_tokens]))
    assert order(lengths, open_group(1), open_group(3), open_group(2)) == [2, 1, 3], "1 is forgotten: 30 as the last"


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(0, 31))
def test_the_mean_of_longer_replies_is_that_of_a_walk_over_all(lengths: list[int], num_tokens: int) -> None:
    longer = [length for length in lengths if length > num_tokens]
    expected = pytest.approx(mean(longer)) if longer else None
    assert Lengths(lengths).mean_beyond(num_tokens) == expected


class OneAtATime:
    """Engines that decode one group each, for a time that is the group's length; the clock is the test's."""

    def __init__(self, num_engines: int) -> None:
        self.num_engines, self.end = num_engines, 0
        self.asked: list[int] = []

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        self.asked = [int(request.group_id) for request in requests]
        free_at = [0] * self.num_engines
        for request in requests:
            length = 1 + request.prompt_token_ids[1] ** 2
            heapreplace(free_at, free_at[0] + length)
            yield from replies(int(request.group_id), [length] * len(request.seeds))
        self.end = max(free_at)

    def abort(self) -> None:
        raise AssertionError("nothing is over-sampled")


def test_in_the_second_epoch_a_step_ends_sooner_with_the_same_samples_of_the_same_prompts() -> None:
    engines = OneAtATime(num_engines=2)
    config = Config(rollout=RolloutConfig(batch_size=6, n_samples_per_prompt=2))

    def take(n: int, start: int) -> list[Prompt]:
        return [prompt(start + i, (start + i) % 6) for i in range(n)]

    def score(asked: Prompt, responses: Sequence[GeneratedSample]) -> PendingSamples:
        return lambda: [Sample(asked, response, "", 1.0) for response in responses]

    source = GeneratedRollouts(config, engines, take, score)  # type: ignore[arg-type]
    first = source.rollout(RunState(0, 0, 0), lambda done, wanted: None)
    assert (engines.asked, engines.end) == ([0, 1, 2, 3, 4, 5], 38)
    second = source.rollout(RunState(1, first.next_prompt_id, 0), lambda done, wanted: None)
    assert (engines.asked, engines.end) == ([11, 10, 9, 8, 7, 6], 31)
    assert [sample.prompt.prompt_id for sample in second.samples] == [6 + i // 2 for i in range(12)]
    assert [sample.response.token_ids for sample in second.samples] == [s.response.token_ids for s in first.samples]
