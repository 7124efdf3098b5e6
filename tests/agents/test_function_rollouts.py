"""A rollout function's step ends: turns that it waits for or leaves behind, groups that it keeps for the next step."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_spec.agents.daemon_threads import DaemonThreads
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import CustomConfig
from slime_spec.errors import CustomFunctionError
from slime_spec.interfaces import RunState
from slime_spec.request_feed import FeedClosed, RequestFeed
from slime_spec.rl.function_rollouts import FunctionRollouts
from slime_spec.slime_sample import Args
from slime_spec.types import FinishReason, GeneratedSample, GroupRequest
from tests.support.agents_harness import START, CoreEngines, agents_config, prompts, step_of, two_turns
from tests.support.embedded_harness import make_core
from tests.support.tiny_policy import make_tiny_policy

LIMIT_S = 20.0  # for what happens at once, or never


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


def rollouts_of(folder: Path, function: Any, engines: Any = None) -> FunctionRollouts:
    config = replace(agents_config(folder), custom=CustomConfig(rollout="mine:f"))
    tokenizer = Tokenizer.load(folder)
    engines = engines or CoreEngines(make_core(config))
    return FunctionRollouts(config, engines, prompts(tokenizer), function, tokenizer, Args())


class TwoTurnEngines:
    """Has two turns before it answers the first; the other's answer comes with an abort, or the engines fail."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.aborted = error, threading.Event()

    def generate(self, feed: RequestFeed) -> Iterator[GeneratedSample]:
        asked: list[GroupRequest] = []
        until = time.monotonic() + LIMIT_S
        while len(asked) < 2 and time.monotonic() < until:
            asked += feed.taken()
            time.sleep(0.001)
        if self.error is not None:
            raise self.error
        yield self._answer(asked[0], "stop")
        assert self.aborted.wait(LIMIT_S), "the turn that is left is waited for"
        yield self._answer(asked[1], "abort")

    def abort(self) -> None:
        self.aborted.set()

    def _answer(self, asked: GroupRequest, reason: FinishReason) -> GeneratedSample:
        return GeneratedSample(asked.group_id, 0, (5,), (-1.0,), reason, 0, len(asked.prompt_token_ids))


@pytest.mark.parametrize("error", [RuntimeError("no engine is left"), KeyboardInterrupt()])
def test_a_function_that_waits_for_a_turn_ends_with_its_step(folder: Path, error: BaseException) -> None:
    """Its thread would wait for the turns for ever, one more with every step that fails."""
    ended: list[Any] = []
    is_over = threading.Event()

    async def waits(args: Any, rollout_id: int, data_source: Any) -> Any:
        ((first, second),) = data_source.get_samples(1)
        turns = [data_source.client(each).turn(each) for each in (first, second)]
        ended.extend(await asyncio.gather(*turns, return_exceptions=True))
        is_over.set()
        return [[first, second]]

    with pytest.raises(type(error)):
        rollouts_of(folder, waits, TwoTurnEngines(error)).rollout(START, lambda *_: None)
    assert is_over.wait(LIMIT_S), "the function waits for ever"
    assert [type(each) for each in ended] == [FeedClosed, FeedClosed]


def test_turns_that_a_function_leaves_behind_are_aborted(folder: Path) -> None:
    async def over_samples(args: Any, rollout_id: int, data_source: Any) -> Any:
        (group,) = data_source.get_samples(1)
        turns = [asyncio.create_task(data_source.client(each).turn(each)) for each in group]
        await asyncio.wait(turns, return_when=asyncio.FIRST_COMPLETED)
        group[0].reward = 1.0
        return [group[:1]]

    step = rollouts_of(folder, over_samples, TwoTurnEngines()).rollout(START, lambda *_: None)
    assert [(each.response.token_ids, each.reward) for each in step.samples] == [((5,), 1.0)]


def test_groups_that_were_added_go_on_with_their_turns_in_the_next_step(folder: Path) -> None:
    """A turn in a step, another in the next: the same as both in one step."""
    first_step: list[Any] = []

    async def half(args: Any, rollout_id: int, data_source: Any) -> Any:
        if rollout_id == 0:
            begun, whole = data_source.get_samples(2)
            first_step.extend(whole)
            for sample in begun:
                await data_source.client(sample).turn(sample)
                data_source.client(sample).insert(sample, f"<{len(set(sample.tokens))}>")
            for sample in whole:
                await two_turns(args, sample, {}, data_source.client(sample))
                sample.reward = 1.0
            data_source.add_samples([begun])
            return [whole]
        if rollout_id == 2:
            return [first_step]
        (group,) = data_source.get_samples(1)
        for sample in group:
            await data_source.client(sample).turn(sample, {"max_new_tokens": 12})
            sample.reward = 1.0
        return [group]

    source = rollouts_of(folder, half)
    source.rollout(START, lambda *_: None)
    step = source.rollout(replace(START, rollout_id=1, next_prompt_id=2), lambda *_: None)
    expected, _ = step_of(agents_config(folder), two_turns)
    of_first = [each for each in expected.samples if each.prompt.prompt_id == 0]
    assert [each.error for each in step.samples] == ["", ""]
    assert [each.response.token_ids for each in step.samples] == [each.response.token_ids for each in of_first]
    assert [each.response.loss_mask for each in step.samples] == [each.response.loss_mask for each in of_first]
    assert [each.response.turns and each.response.turns.num_turns for each in step.samples] == [2, 2]
    with pytest.raises(CustomFunctionError, match="a sample of no prompt that it got"):
        source.rollout(replace(START, rollout_id=2, next_prompt_id=2), lambda *_: None)


async def one_group(args: Any, rollout_id: int, data_source: Any) -> Any:
    groups = data_source.get_samples(1)
    for sample in groups[0]:
        await two_turns(args, sample, {}, data_source.client(sample))
        sample.reward = 1.0
    return groups


@pytest.mark.parametrize("given", [None, [], [[]], "groups", [5]])
def test_a_function_that_returns_no_samples_ends_the_run(folder: Path, given: Any) -> None:
    with pytest.raises(CustomFunctionError, match=r"must return groups of samples, list\[list\[Sample\]\]"):
        rollouts_of(folder, lambda args, rollout_id, data_source: given).rollout(START, lambda *_: None)


def _raising(error: BaseException, is_async: bool) -> Any:
    def directly(args: Any, rollout_id: int, data_source: Any) -> Any:
        raise error

    async def awaited(args: Any, rollout_id: int, data_source: Any) -> Any:
        raise error

    return awaited if is_async else directly


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
def test_a_function_that_ends_as_no_exception_does_is_told(folder: Path, error: BaseException, is_async: bool) -> None:
    """Each would end the run without a word in the main thread: an exit, and what a signal raises there."""
    with pytest.raises(CustomFunctionError, match=f"mine:f: {type(error).__name__}"):
        rollouts_of(folder, _raising(error, is_async)).rollout(START, lambda *_: None)


class DeafEngines(TwoTurnEngines):
    """Answers nothing and hears no abort; its generation ends with the feed."""

    asked = 0

    def generate(self, feed: RequestFeed) -> Iterator[GeneratedSample]:
        while feed.has_more:
            self.asked += len(feed.taken())
            time.sleep(0.001)
        yield from ()

    def abort(self) -> None:
        raise RuntimeError("no engine hears it")


def test_an_abort_that_fails_does_not_keep_the_step_waiting(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engines = DeafEngines()

    async def leaves_a_turn(args: Any, rollout_id: int, data_source: Any) -> Any:
        ((first, _),) = data_source.get_samples(1)
        turn = asyncio.create_task(data_source.client(first).turn(first))
        while not engines.asked:
            await asyncio.sleep(0.001)
        turn.cancel()
        first.reward = 1.0
        return [[first]]

    source = rollouts_of(folder, leaves_a_turn, engines)
    step = DaemonThreads(1, "step").submit(source.rollout, START, lambda *_: None).result(LIMIT_S)
    assert [each.reward for each in step.samples] == [1.0]
    assert "no engine hears it" in caplog.text


def test_fewer_groups_than_a_step_has_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rollouts_of(folder, one_group).rollout(START, lambda *_: None)
    assert [each.levelname for each in caplog.records if "groups=1 asked=2" in each.getMessage()] == ["WARNING"]


@pytest.mark.parametrize("makes", ["a step", "a group"])
def test_prompts_that_a_checkpoint_left_come_before_new_ones_and_each_once(folder: Path, makes: str) -> None:
    """A checkpoint of a partial rollout has prompts that no step was trained on: 4, 6 and 8, before the new 9."""
    state = replace(START, rollout_id=3, next_prompt_id=9, unfinished_prompt_ids=(8, 4, 6))
    source = rollouts_of(folder, one_group)
    seen: list[list[int]] = []
    for _ in range(3):
        if makes == "a step":
            step = source.rollout(state, lambda *_: None)
        else:
            step, _ = step_of(agents_config(folder), two_turns, state)
        seen.append(sorted({each.prompt.prompt_id for each in step.samples}))
        state = replace(state, next_prompt_id=step.next_prompt_id, unfinished_prompt_ids=step.unfinished_prompt_ids)
    if makes == "a step":  # of one prompt
        assert (seen, state.unfinished_prompt_ids, state.next_prompt_id) == ([[4], [6], [8]], (), 9)
    else:  # of two
        assert (seen, state.unfinished_prompt_ids, state.next_prompt_id) == ([[4, 6], [8, 9], [10, 11]], (), 12)


def test_prompts_of_groups_that_a_function_kept_come_again_in_a_resumed_run(folder: Path) -> None:
    async def keeps(args: Any, rollout_id: int, data_source: Any) -> Any:
        kept, group = data_source.get_samples(2)
        for sample in group:
            await data_source.client(sample).turn(sample)
            sample.reward = 1.0
        data_source.add_samples([kept])
        return [group]

    def ids(step: Any) -> set[int]:
        return {each.prompt.prompt_id for each in step.samples}

    def after(step: Any) -> RunState:
        return replace(START, next_prompt_id=step.next_prompt_id, unfinished_prompt_ids=step.unfinished_prompt_ids)

    source = rollouts_of(folder, keeps)
    first = source.rollout(START, lambda *_: None)
    assert (ids(first), first.unfinished_prompt_ids, first.next_prompt_id) == ({1}, (0,), 2)
    going_on, resumed = (each.rollout(after(first), lambda *_: None) for each in (source, rollouts_of(folder, keeps)))
    for second in (going_on, resumed):
        assert (ids(second), second.unfinished_prompt_ids, second.next_prompt_id) == ({2}, (0,), 3)


BLOCKING = """
import asyncio, sys, threading, time
from pathlib import Path
from tests.agents.test_function_rollouts import TwoTurnEngines, rollouts_of, START
folder, how = Path(sys.argv[1]), sys.argv[2]
blocks = threading.Event()

class Fails(TwoTurnEngines):
    def generate(self, feed):
        assert blocks.wait(20), "the function has not begun"
        raise RuntimeError("no engine is left")
        yield

def waits():
    blocks.set()
    threading.Event().wait()

def directly(args, rollout_id, data_source):
    waits()

async def in_a_thread(args, rollout_id, data_source):
    await asyncio.to_thread(waits)

rollouts_of(folder, {"directly": directly, "in a thread": in_a_thread}[how], Fails()).rollout(START, lambda *_: None)
"""


@pytest.mark.parametrize("how", ["directly", "in a thread"])
def test_a_function_that_blocks_for_ever_does_not_hold_a_process_that_has_failed(folder: Path, how: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKING, str(folder), how],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, "RuntimeError: no engine is left" in done.stderr) == (1, True), done.stderr
