"""Replies to a prompt go with its next request, from the driver, where the algorithm drafts from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from rollout.fake import FakeGeneration
from slime_spec.config.tree import Config, RolloutConfig, SpeculativeConfig
from slime_spec.interfaces import RunState
from slime_spec.partial_samples import request_for_rest, with_siblings
from slime_spec.rl.reply_history import ReplyHistory
from slime_spec.rl.rollouts import GeneratedRollouts
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest, Prompt, Sample, SamplingParams

NUM_PROMPTS, NUM_SAMPLES = 4, 3


def sample(token_ids: tuple[int, ...], version: int = 0, reason: str = "stop") -> GeneratedSample:
    return GeneratedSample("g", 0, token_ids, (0.0,) * len(token_ids), reason, version, 2)  # type: ignore[arg-type]


def test_the_latest_replies_to_a_prompt_come_back_oldest_first() -> None:
    history = ReplyHistory(max_replies=3)
    history.note((1, 2), [sample((5, 6), 4), sample((7,), 4)])
    history.note((1, 2), [sample((8,), 9), sample((9, 9), 9)])
    assert history.of([1, 2]) == (EarlierReply((7,), 4), EarlierReply((8,), 9), EarlierReply((9, 9), 9))
    assert history.num_tokens == 4
    assert history.of((1,)) == history.of((2, 1)) == ()


def test_what_was_not_finished_and_what_is_empty_is_not_kept() -> None:
    history = ReplyHistory()
    history.note((1,), [sample((5,), reason="abort"), sample(())])
    assert (history.of((1,)), history.num_tokens) == ((), 0)
    history.note((1,), [sample((5,), reason="length")])
    assert history.of((1,)) == (EarlierReply((5,), 0),)


def test_the_prompts_asked_for_longest_ago_leave_when_all_replies_are_too_long() -> None:
    history = ReplyHistory(max_tokens=10)
    for prompt in range(3):
        history.note((prompt,), [sample((prompt, 8, 9))])
    assert history.of((0,))
    history.note((3,), [sample((4, 4))])  # 11 tokens: prompt 1 is the oldest now
    assert [bool(history.of((prompt,))) for prompt in range(4)] == [True, False, True, True]
    assert history.num_tokens == 8
    history.note((4,), [sample((1,) * 11)])
    assert history.num_tokens == 0


class FakeEngines:
    """One fake engine, whose weights have a new version every step; ``abort`` cuts what has not come back."""

    def __init__(self) -> None:
        self.version, self.is_aborted = 0, False
        self.asked: list[list[GroupRequest]] = []

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        self.asked.append(list(requests))
        self.is_aborted = False
        generations = [FakeGeneration(request, 0, self.version) for request in requests]
        running = list(zip(requests, map(iter, generations), generations, strict=True))
        for turn in range(NUM_SAMPLES):  # the groups' samples come in turn
            for request, samples, generation in running:
                if self.is_aborted:
                    generation.abort()
                if turn < len(request.seeds):
                    yield next(samples)

    def abort(self) -> None:
        self.is_aborted = True


def prompts(count: int, start: int) -> list[Prompt]:
    """Four prompts, again and again."""
    return [Prompt(i, "task", "?", (1, i % NUM_PROMPTS), "x") for i in range(start, start + count)]


def score(prompt: Prompt, responses: Sequence[GeneratedSample]) -> PendingSamples:
    return lambda: [Sample(prompt, each, "", 1.0) for each in responses]


def steps_of(algorithm: str, num_steps: int, in_progress: int | None = None) -> tuple[FakeEngines, list[list[Sample]]]:
    rollout = RolloutConfig(
        batch_size=NUM_PROMPTS // 2,
        n_samples_per_prompt=NUM_SAMPLES,
        over_sampling_batch_size=in_progress,
        partial_rollout=in_progress is not None,
    )
    config = Config(rollout=rollout, speculative=SpeculativeConfig(algorithm=algorithm))
    engines, steps = FakeEngines(), []
    source = GeneratedRollouts(config, engines, prompts, score)  # type: ignore[arg-type]
    state = RunState(rollout_id=0, next_prompt_id=0, weight_version=0)
    for _ in range(num_steps):
        step = source.rollout(state, lambda done, wanted: None)
        steps.append(step.samples)
        engines.version += 1
        state = RunState(state.rollout_id + 1, step.next_prompt_id, engines.version, step.unfinished_prompt_ids)
    return engines, steps


def test_a_prompts_second_epoch_brings_the_replies_of_its_first() -> None:
    engines, steps = steps_of("HISTORY", num_steps=4)
    assert [request.earlier for asked in engines.asked[:2] for request in asked] == [()] * NUM_PROMPTS
    for number, asked in enumerate(engines.asked[2:]):
        for request in asked:
            first = [each.response for each in steps[number] if each.prompt.token_ids == request.prompt_token_ids]
            assert request.earlier == tuple(EarlierReply(each.token_ids, number) for each in first)
            assert len(request.earlier) == NUM_SAMPLES


@pytest.mark.parametrize("algorithm", ["NONE", "LOOKUP", "NGRAM"])
def test_no_replies_go_to_an_algorithm_that_does_not_read_them(algorithm: str) -> None:
    engines, _ = steps_of(algorithm, num_steps=4, in_progress=NUM_PROMPTS)
    assert all(request.earlier == () for asked in engines.asked for request in asked)
    with_history, _ = steps_of("HISTORY", num_steps=4, in_progress=NUM_PROMPTS)
    assert [len(asked) for asked in with_history.asked] == [len(asked) for asked in engines.asked]


def test_a_groups_finished_samples_go_with_the_request_for_the_rest_of_it() -> None:
    engines, _ = steps_of("HISTORY", num_steps=3, in_progress=NUM_PROMPTS)
    resumed = [request for asked in engines.asked[1:] for request in asked if request.partials]
    siblings = [[each for each in request.earlier if each.is_sibling] for request in resumed]
    assert [len(each) for each in siblings] == [NUM_SAMPLES - len(request.partials) for request in resumed]
    assert any(siblings)


def test_a_request_takes_each_finished_sample_once_beside_what_came_with_it() -> None:
    known = EarlierReply((4, 5), 3)
    request = GroupRequest("g", (1,), (10, 11, 12), SamplingParams(), earlier=(known,))
    first, same_words = replace(sample((4, 5), 6), sample_index=1), replace(sample((4, 5), 6), sample_index=2)
    asked = with_siblings(with_siblings(request, [first]), [first, same_words])
    assert asked.earlier == (known, EarlierReply((4, 5), 6, 1), EarlierReply((4, 5), 6, 2))
    assert request_for_rest(asked, [sample((), reason="abort")]).earlier == asked.earlier
