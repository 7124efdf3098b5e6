"""Over-sampling: a step ends with the first complete groups, the next one goes on with the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from rollout.fake import FakeGeneration
from slime_spec.config.checks import check, notes
from slime_spec.config.tree import Config, RolloutConfig
from slime_spec.errors import ConfigError
from slime_spec.interfaces import RunState
from slime_spec.rl.rollouts import GeneratedRollouts
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.types import GeneratedSample, GroupRequest, Prompt, Sample

BATCH, IN_PROGRESS, NUM_SAMPLES = 3, 7, 2
START = RunState(rollout_id=0, next_prompt_id=0, weight_version=0)


class FakeEngines:
    """One fake engine that takes groups in an order of its own; ``version`` is that of its weights."""

    def __init__(self, aborts_itself: str = "") -> None:
        self.version, self.num_aborts, self.aborts_itself = 0, 0, aborts_itself
        self.asked: list[list[GroupRequest]] = []

    def generate(self, requests: Sequence[GroupRequest]) -> Iterator[GeneratedSample]:
        self.asked.append(list(requests))
        num_aborts = self.num_aborts
        for request in sorted(requests, key=lambda request: 5 * int(request.group_id) % 8):
            generation = FakeGeneration(request, 0, self.version)
            samples = iter(generation)
            for _ in request.seeds:
                if self.num_aborts > num_aborts or request.group_id == self.aborts_itself:
                    generation.abort()
                yield next(samples)

    def abort(self) -> None:
        self.num_aborts += 1


def config(in_progress: int | None = IN_PROGRESS) -> Config:
    return Config(
        rollout=RolloutConfig(
            batch_size=BATCH,
            n_samples_per_prompt=NUM_SAMPLES,
            over_sampling_batch_size=in_progress,
            partial_rollout=in_progress is not None,
        )
    )


def prompts(n: int, start: int) -> list[Prompt]:
    return [Prompt(start + i, "task", "?", (1, 2), "x") for i in range(n)]


def score(prompt: Prompt, responses: Sequence[GeneratedSample]) -> PendingSamples:
    is_aborted = {each.sample_index: each.finish_reason == "abort" for each in responses}
    samples = [
        Sample(
            prompt, each, "", None if is_aborted[each.sample_index] else 1.0, "aborted" * is_aborted[each.sample_index]
        )
        for each in responses
    ]
    return lambda: samples


def rollouts_of(engines: FakeEngines, chosen: Config) -> GeneratedRollouts:
    return GeneratedRollouts(chosen, engines, prompts, score)  # type: ignore[arg-type]


def run(
    engines: FakeEngines, chosen: Config, num_steps: int, state: RunState = START
) -> tuple[list[list[Sample]], RunState]:
    """The samples of each step, after each of which the engines get the next version."""
    source, steps = rollouts_of(engines, chosen), []
    for _ in range(num_steps):
        step = source.rollout(state, lambda done, wanted: None)
        steps.append(step.samples)
        engines.version += 1
        state = RunState(state.rollout_id + 1, step.next_prompt_id, engines.version, step.unfinished_prompt_ids)
    return steps, state


def ids_of(samples: Sequence[Sample]) -> list[int]:
    return sorted({sample.prompt.prompt_id for sample in samples})


def test_a_step_has_its_batch_of_whole_groups_and_no_prompt_is_skipped_or_doubled() -> None:
    steps, state = run(FakeEngines(), config(), num_steps=9)
    for samples in steps:
        keys = [(sample.prompt.prompt_id, sample.response.sample_index) for sample in samples]
        assert keys == [(prompt_id, index) for prompt_id in ids_of(samples) for index in range(NUM_SAMPLES)]
        assert len(ids_of(samples)) == BATCH
        assert all(sample.reward is not None for sample in samples)
    used = [prompt_id for samples in steps for prompt_id in ids_of(samples)]
    assert sorted([*used, *state.unfinished_prompt_ids]) == list(range(state.next_prompt_id))
    assert len(state.unfinished_prompt_ids) == IN_PROGRESS - BATCH
    assert used != sorted(used), "the engines' order was the prompts', and nothing overtook anything"


def test_what_is_left_goes_on_from_its_tokens_under_the_newer_weights() -> None:
    engines = FakeEngines()
    steps, _ = run(engines, config(), num_steps=6)
    undisturbed, _ = run(FakeEngines(), config(in_progress=None), num_steps=12)
    whole = {
        (each.prompt.prompt_id, each.response.sample_index): each.response for step in undisturbed for each in step
    }
    num_mixed = 0
    for number, samples in enumerate(steps):
        for response in (sample.response for sample in samples):
            expected = whole[int(response.group_id), response.sample_index]
            assert (response.token_ids, response.logprobs) == (expected.token_ids, expected.logprobs)
            assert response.finish_reason == "stop"
            versions = [version for _, version in response.spans]
            assert versions == sorted(versions)
            assert versions[-1] <= number
            assert response.weight_version == versions[0]
            num_mixed += len(versions) > 1
    assert num_mixed > 0, "no sample went on under newer weights"
    assert any(part.token_ids for asked in engines.asked for request in asked for part in request.partials)


def test_a_resumed_run_begins_its_unfinished_prompts_anew_and_takes_the_next_new_ones_after_them() -> None:
    steps, state = run(FakeEngines(), config(), num_steps=2)
    later = FakeEngines()
    more, end = run(later, config(), num_steps=3, state=state)
    first_asked = [int(request.group_id) for request in later.asked[0]]
    assert first_asked == [*state.unfinished_prompt_ids, *range(state.next_prompt_id, state.next_prompt_id + BATCH)]
    assert all(request.partials == () for request in later.asked[0])
    used = [prompt_id for samples in steps + more for prompt_id in ids_of(samples)]
    assert sorted([*used, *end.unfinished_prompt_ids]) == list(range(end.next_prompt_id))


def test_a_run_resumed_without_over_sampling_finishes_what_was_begun_first() -> None:
    _, state = run(FakeEngines(), config(), num_steps=1)
    (first, second), end = run(FakeEngines(), config(in_progress=None), num_steps=2, state=state)
    left = sorted(state.unfinished_prompt_ids)
    assert set(ids_of(first)) < set(left)
    assert set(left) < set(ids_of(first) + ids_of(second))
    assert end.unfinished_prompt_ids == ()
    assert end.next_prompt_id == 9


def test_without_over_sampling_nothing_is_aborted_or_left() -> None:
    engines = FakeEngines()
    steps, state = run(engines, config(in_progress=None), num_steps=2)
    assert [ids_of(samples) for samples in steps] == [[0, 1, 2], [3, 4, 5]]
    assert (engines.num_aborts, state.unfinished_prompt_ids, state.next_prompt_id) == (0, (), 6)


def test_a_sample_that_an_engine_aborts_unasked_is_excluded_and_not_asked_for_for_ever() -> None:
    engines = FakeEngines(aborts_itself="1")
    (samples,), state = run(engines, config(in_progress=None), num_steps=1)
    assert [sample.prompt.prompt_id for sample in samples if sample.reward is None] == [1] * NUM_SAMPLES
    assert len(engines.asked) == 1
    assert state.unfinished_prompt_ids == ()


def test_progress_counts_up_to_the_samples_that_the_step_needs() -> None:
    told: list[tuple[int, int]] = []
    rollouts_of(FakeEngines(), config()).rollout(START, lambda done, wanted: told.append((done, wanted)))
    assert {wanted for _, wanted in told} == {BATCH * NUM_SAMPLES}
    assert [done for done, _ in told] == list(range(BATCH * NUM_SAMPLES + 1))


def with_rollout(**settings: object) -> Config:
    chosen = config()
    return replace(chosen, rollout=replace(chosen.rollout, **settings))  # type: ignore[arg-type]


def test_settings_that_would_lose_groups_are_refused() -> None:
    check(config())
    with pytest.raises(ConfigError, match=r"at least rollout\.batch_size"):
        check(with_rollout(over_sampling_batch_size=2))
    with pytest.raises(ConfigError, match="Add --partial-rollout"):
        check(with_rollout(partial_rollout=False))
    assert not [note for note in notes(config()) if "partial-rollout" in note]
    assert [note for note in notes(with_rollout(over_sampling_batch_size=None)) if "partial-rollout" in note]
