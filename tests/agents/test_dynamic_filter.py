"""Steps of the first prompts whose groups a filter keeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.coordinator import Coordinator
from rollout.dispatch import Dispatcher
from rollout.fake_calls import FakeCalls
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.checks import check
from slime_spec.config.tree import Config, CustomConfig, RolloutConfig
from slime_spec.errors import ConfigError, CustomFunctionError
from slime_spec.request_feed import FeedClosed, RequestFeed
from slime_spec.rl.dynamic_filter import Judgement, make_filter, nonzero_std
from slime_spec.rl.groups import EngineGroups
from slime_spec.rl.ordered_rollouts import OrderedRollouts
from slime_spec.rl.rollouts import Rollout
from slime_spec.slime_sample import Args
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.types import GeneratedSample, GroupRequest, Prompt, Sample, SamplingParams
from tests.support.agents_harness import START, agents_config, one_turn, step_of, two_turns
from tests.support.tiny_policy import make_tiny_policy

SLIMES = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def coordinator() -> Coordinator:
    return Coordinator(FakeCalls(2, 3, lambda: time.sleep(0.0005)), 2, 8)


def score(prompt: Prompt, responses: Sequence[GeneratedSample], owns: Sequence[Any] = ()) -> PendingSamples:
    """Rewards differ in the groups of odd prompts; of prompt 4 nobody knows them. Early prompts take longer."""
    rewards = [None if prompt.prompt_id == 4 else float(prompt.prompt_id % 2 and i) for i in range(len(responses))]

    def wait() -> list[Sample]:
        time.sleep(0.02 / (1 + prompt.prompt_id))
        pairs = zip(responses, rewards, strict=True)
        return [Sample(prompt, each, "", reward, "" if reward is not None else "failed") for each, reward in pairs]

    return wait


def kept(config: Config, name: str = "nonzero_std", function: Any = None, generate: Any = None) -> Rollout:
    judge = make_filter(name, function, Args())
    rollout, _ = step_of(config, generate, dynamic_filter=judge, engines=coordinator(), score=score)
    return rollout


def ids_of(rollout: Rollout) -> list[int]:
    return sorted({sample.prompt.prompt_id for sample in rollout.samples})


@pytest.mark.parametrize("generate", [None, one_turn], ids=["plain", "a function"])
@pytest.mark.parametrize("at_once", [None, 3, 9])
def test_the_step_is_the_first_prompts_that_the_filter_keeps_however_many_are_begun(
    folder: Path, at_once: int | None, generate: Any
) -> None:
    config = agents_config(folder, rollout={"batch_size": 3, "over_sampling_batch_size": at_once})
    rollout = kept(config, generate=generate)
    assert ids_of(rollout) == [1, 3, 5]
    assert len(rollout.samples) == 6
    assert rollout.next_prompt_id == 6
    assert rollout.metrics == {
        "rollout/dynamic_filter/drop_zero_std_0.0": 2,  # of prompts 0 and 2
        "rollout/dynamic_filter/drop_no_reward": 1,
    }


def test_with_fallback_as_many_are_dropped_as_were_begun_too_many(folder: Path) -> None:
    config = agents_config(folder, rollout={"batch_size": 3, "over_sampling_batch_size": 5})
    rollout = kept(config, "nonzero_std_with_fallback")
    assert ids_of(rollout) == [1, 3, 4], "0 and 2 were to spare, 4 was not"
    assert rollout.metrics == {"rollout/dynamic_filter/drop_zero_std_0.0": 2}


def test_groups_are_kept_where_rewards_differ() -> None:
    assert nonzero_std([1.0, 1.0, 0.0]).keep
    assert nonzero_std([0.25, 0.25]) == Judgement(False, "zero_std_0.2")
    assert nonzero_std([3.0]) == Judgement(False, "zero_std_3.0")
    assert not nonzero_std([1.0, 1.0 + 1e-7]).keep


def test_an_own_filter_gets_scored_samples_and_answers_in_slimes_ways(folder: Path) -> None:
    seen: list[list[float]] = []

    def one_in_three(args: Any, samples: list[Any], **kwargs: Any) -> Any:
        seen.append([sample.reward for sample in samples])
        keep = samples[0].group_index % 3 == 0
        assert samples[0].tokens[-samples[0].response_length :]
        return SimpleNamespace(keep=keep, reason="no/third") if samples[0].group_index % 2 else keep

    rollout = kept(agents_config(folder), "mine:f", one_in_three)
    assert ids_of(rollout) == [0, 3]
    assert rollout.metrics == {
        "rollout/dynamic_filter/drop_no_third": 1,
        "rollout/dynamic_filter/drop_filter": 1,
    }
    assert [0.0, 1.0] in seen


def test_a_filter_that_fails_or_keeps_nothing_ends_the_run_with_its_name(folder: Path) -> None:
    def broken(args: Any, samples: list[Any]) -> Any:
        return samples[7]

    with pytest.raises(CustomFunctionError, match="the filter mine:f raised IndexError"):
        kept(agents_config(folder), "mine:f", broken)
    with pytest.raises(CustomFunctionError, match=r"dropped 401 groups of one step and kept 0 .*filter: \d+"):
        kept(agents_config(folder), "mine:f", lambda args, samples: False)


def test_a_generation_takes_requests_until_its_feed_is_closed_and_raises_what_the_feed_was_given() -> None:
    params = SamplingParams(max_new_tokens=9)
    asked = [GroupRequest(str(g), (1, 2), (3 * g, 3 * g + 1), params) for g in range(12)]
    at_once = {(each.group_id, each.sample_index): each.token_ids for each in coordinator().generate(asked)}
    feed = RequestFeed()
    feed.put(asked[0])

    def put_others() -> None:
        for request in asked[1:]:
            feed.put(request)
            time.sleep(0.002)
        feed.close()

    thread = threading.Thread(target=put_others)
    thread.start()
    fed = {(each.group_id, each.sample_index): each.token_ids for each in coordinator().generate(feed)}
    thread.join()
    assert fed == at_once
    with pytest.raises(FeedClosed, match="0: the step has ended"):
        feed.put(asked[0])
    failing = RequestFeed()
    failing.fail(ZeroDivisionError("elsewhere"))
    with pytest.raises(ZeroDivisionError, match="elsewhere"):
        list(coordinator().generate(failing))


def test_a_filtered_run_drafts_from_the_replies_that_a_prompt_had_before(folder: Path) -> None:
    """Every prompt is the same text, so that each group but the first step's has replies to draft from."""
    config = agents_config(folder, "HISTORY", {"batch_size": 2}, generate=None)
    tokenizer = Tokenizer.load(folder)

    def take(num: int, start: int) -> list[Prompt]:
        return [Prompt(start + i, "task", "same", tokenizer.encode("same"), "") for i in range(num)]

    calls = FakeCalls(1, 3, lambda: time.sleep(0.0005))
    engines: Any = Coordinator(calls, 1, 8)
    source = OrderedRollouts(
        config, engines, take, score, EngineGroups(config), make_filter("nonzero_std", None, Args())
    )
    first = source.rollout(START, lambda *_: None)
    num_first = len(calls.sent)
    source.rollout(replace(START, next_prompt_id=first.next_prompt_id), lambda *_: None)
    assert calls.sent[0][1].earlier == ()
    later = [request.earlier for _, request in calls.sent[num_first:]]
    replies = {each.response.token_ids for each in first.samples}
    assert later
    assert all(replies & {each.token_ids for each in earlier} for earlier in later)


def test_a_turn_goes_to_the_engine_of_the_turn_before_while_it_has_room(folder: Path) -> None:
    calls = FakeCalls(3, 3, lambda: time.sleep(0.0005))
    config = agents_config(folder, rollout={"batch_size": 6})
    engines: Any = Coordinator(calls, 3, 64)
    rollout, _ = step_of(config, two_turns, engines=engines)
    of_group = {request.group_id: engine for engine, request in calls.sent}
    first = {name[:-2]: engine for name, engine in of_group.items() if name.endswith("/0")}
    assert set(first.values()) == {0, 1, 2}
    assert {name[:-2]: engine for name, engine in of_group.items() if name.endswith("/1")} == first
    full = Dispatcher([True, True], samples_per_engine=1)
    assert [full.assign(1, near=1), full.assign(1, near=1), full.assign(1, near=1)] == [1, 0, None]
    gone = Dispatcher([True, False], samples_per_engine=1)
    assert gone.assign(1, near=1) == 0
    assert len(rollout.samples) == 12


def test_an_abort_closes_the_feed_and_every_sample_comes_out() -> None:
    coordinated, feed = coordinator(), RequestFeed()
    for g in range(6):
        feed.put(GroupRequest(str(g), (1, 2), (3 * g, 3 * g + 1), SamplingParams(max_new_tokens=9)))

    def until_aborted() -> Iterator[GeneratedSample]:
        for number, sample in enumerate(coordinated.generate(feed)):
            if number == 2:
                coordinated.abort()
            yield sample

    samples = list(until_aborted())
    assert len({(each.group_id, each.sample_index) for each in samples}) == len(samples) == 12
    assert {each.finish_reason for each in samples} == {"stop", "abort"}
    assert not feed.has_more


def config(sizes: dict[str, Any] | None = None, **custom: Any) -> Config:
    return Config(rollout=RolloutConfig(**(sizes or {})), custom=CustomConfig(**custom))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (config({"partial_rollout": True}, generate="a:b"), r"custom\.generate: is not for --partial-rollout"),
        (config({"partial_rollout": True}, dynamic_filter=SLIMES), r"custom\.dynamic_filter: is not for --partial"),
        (config({"over_sampling_batch_size": 16}), "or --dynamic-sampling-filter-path nonzero_std"),
        (config({"max_context_len": 100}), r"max_context_len: must hold a prompt and a response: .* = 576"),
        (config(rollout="slime.rollout.sft_rollout.generate_rollout"), "Use another trainer for SFT"),
        (config(rollout="slime.rollout.sleep_rollout.sleep"), "is slime's own and talks to slime's servers"),
        (config(rollout="a:b", generate="a:b"), "Drop --custom-generate-function-path, or --rollout-function-path"),
    ],
)
def test_settings_that_contradict_each_other_are_one_clear_error(settings: Config, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check(settings)


def test_slimes_flags_of_a_filter_with_over_sampling_are_taken_as_they_are() -> None:
    check(config({"over_sampling_batch_size": 16}, dynamic_filter=SLIMES))
    check(config({"max_context_len": 4096}, rollout="slime.rollout.sglang_rollout.generate_rollout"))
    assert config({"max_context_len": 4096}).rollout.longest == 4096
