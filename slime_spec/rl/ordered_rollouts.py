"""A step of the first prompts, in their order, whose groups a filter keeps.

    prompts, by id    10    11    12    13    14    15
    groups            keep  drop  keep  keep  made  open        batch_size 3: the step is 10, 12 and 13

Groups beyond (over-sampling begins them at once, so that nobody waits for their replacements) are given up, and their
prompts come again in the next step: which groups a step trains on depends on no time, and short replies are not
preferred. Everything else that a step needs later happens meanwhile: turns, rewards, filters.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from typing import Any

from slime_spec.agents.as_slime import as_slime
from slime_spec.agents.daemon_threads import DaemonThreads
from slime_spec.agents.returned import Made
from slime_spec.config.tree import Config
from slime_spec.errors import CustomFunctionError
from slime_spec.interfaces import Engines, RunState
from slime_spec.metrics.rollout import filter_metrics
from slime_spec.request_feed import RequestFeed
from slime_spec.rl.dynamic_filter import Filter, Judgement, keep_all
from slime_spec.rl.groups import Groups
from slime_spec.rl.rollouts import Progress, PromptIds, Rollout
from slime_spec.tasks.judge import Reply, Verdict, verdict_of
from slime_spec.tasks.scoring import PendingSamples, warn_of
from slime_spec.types import GeneratedSample, Prompt, Sample

NUM_WAITING_THREADS = 16  # each waits for one group's rewards
# Groups that a filter may drop for each that a step needs: beyond it the run would only burn time.
MOST_DROPPED = 200
Score = Callable[[Prompt, Sequence[GeneratedSample], Sequence[Any]], PendingSamples]
TakePrompts = Callable[[int, int], Sequence[Prompt]]


@dataclass(frozen=True)
class Settled:
    """Holds a group whose rewards are known: its samples, the same as functions see them, and the filter's word."""

    samples: tuple[Sample, ...]
    owns: tuple[Any, ...]
    judgement: Judgement


class OrderedRollouts:
    """Implements RolloutSource by Groups; see the module's head. ``dynamic_filter`` None keeps every group."""

    def __init__(
        self,
        config: Config,
        engines: Engines,
        take_prompts: TakePrompts,
        score: Score,
        groups: Groups,
        dynamic_filter: Filter | None = None,
    ) -> None:
        self._config, self._engines, self._take_prompts = config, engines, take_prompts
        self._score, self._groups = score, groups
        self._filter = dynamic_filter or keep_all

    def rollout(self, state: RunState, progress: Progress) -> Rollout:
        """Generate, score and filter one step."""
        feed = RequestFeed(self._groups.check)
        self._groups.begin_step(feed, state)
        threads = DaemonThreads(NUM_WAITING_THREADS, "rollout")  # a filter may never return
        step = _Step(self._config, PromptIds.of(state), self._begin(threads, feed), progress)
        step.ended = lambda has_others: self._end(feed, has_others)
        try:
            step.begin()
            for response in self._engines.generate(feed):
                self._groups.arrived(response)
        finally:
            step.is_over = True
            feed.close()
            self._groups.end_step()
            threads.shutdown(wait=False, cancel_futures=True)  # rewards of groups that were given up
        return step.rollout()

    def close(self) -> None:
        self._groups.close()

    def _end(self, feed: RequestFeed, has_others: bool) -> None:
        if has_others:
            self._groups.end_step()
            self._engines.abort()  # before the generation can end: the abort is of this one
        feed.close()

    def _begin(self, threads: DaemonThreads, feed: RequestFeed) -> Callable[[_Step, int], None]:
        """Return what begins the group of a prompt at a place of the step, and settles it there when it is complete."""

        def settle(step: _Step, place: int, prompt: Prompt, made: list[Made]) -> None:
            try:
                step.settle(place, self._settled(prompt, made))
            except BaseException as error:  # noqa: BLE001 - the main thread raises it
                feed.fail(error)

        def complete(step: _Step, place: int, prompt: Prompt, group: Future[list[Made]]) -> None:
            try:
                made = group.result()
                if not step.is_over:
                    threads.submit(settle, step, place, prompt, made)
            except (CancelledError, Exception) as error:  # noqa: BLE001 - the main thread raises it
                if not step.is_over:  # which it may have become since: the threads take no call then
                    feed.fail(error)

        def begin(step: _Step, place: int) -> None:
            (prompt,) = self._take_prompts(1, step.ids[place])
            self._groups.begin(prompt).add_done_callback(lambda group: complete(step, place, prompt, group))

        return begin

    def _settled(self, prompt: Prompt, made: Sequence[Made]) -> Settled:
        samples = self._scored(prompt, made)
        owns = tuple(as_slime(sample, each.own) for sample, each in zip(samples, made, strict=True))
        return Settled(tuple(samples), owns, self._filter(samples, owns))

    def _scored(self, prompt: Prompt, made: Sequence[Made]) -> list[Sample]:
        """Return each sample with its reward: the function's own, or else the task's."""
        given = {index: each.own.reward for index, each in enumerate(made) if _has_reward(each)}
        asked = [index for index, each in enumerate(made) if index not in given and not each.error]
        owns = [made[index].own for index in asked]
        is_own = any(own is not None for own in owns)
        scored = self._score(prompt, [made[index].response for index in asked], owns if is_own else ())()
        samples = {
            index: replace(sample, prompt=made[index].prompt) for index, sample in zip(asked, scored, strict=True)
        }
        for index, each in enumerate(made):
            if index not in samples:
                key, text = self._config.task.reward_key, "" if each.own is None else each.own.response
                verdict = Verdict(None, each.error) if each.error else verdict_of(given[index], key)
                warn_of(Reply(each.prompt, each.response, text), verdict)
                samples[index] = Sample(each.prompt, each.response, text, verdict.reward, verdict.error)
        return [samples[index] for index in range(len(made))]


def _has_reward(made: Made) -> bool:
    return made.own is not None and getattr(made.own, "reward", None) is not None


class _Step:
    """Knows which groups of a step are begun, settled and needed; every method may be called from any thread.

    A group is known by its place among the prompts that the step may take.
    """

    def __init__(self, config: Config, ids: PromptIds, begin: Callable[[_Step, int], None], progress: Progress) -> None:
        rollout = config.rollout
        self._size, self._at_once = rollout.batch_size, rollout.over_sampling_batch_size or 0
        self._num_samples = rollout.n_samples_per_prompt
        self.ids, self._num_begun, self._begin, self._progress = ids, 0, begin, progress
        self._settled: dict[int, Settled] = {}
        self._chosen: list[int] = []
        self._lock = threading.RLock()
        self.is_over = False
        self.ended: Callable[[bool], None] = lambda has_others: None

    def begin(self) -> None:
        """Begin the groups that a step needs at first."""
        self._report()
        with self._lock:
            self._open(max(self._size, self._at_once))

    def settle(self, place: int, settled: Settled) -> None:
        """Note a group's samples; begin other groups, or end the step, where this decides it."""
        with self._lock:
            if self.is_over:
                return
            self._settled[place] = settled
            chosen, num_dropped, num_open = self._look()
            self._report()
            if num_dropped > MOST_DROPPED * self._size:
                self.is_over = True
                reasons = ", ".join(f"{reason}: {num}" for reason, num in self._dropped().items())
                raise CustomFunctionError(
                    f"the filter dropped {num_dropped} groups of one step and kept {len(chosen)} ({reasons})"
                )
            if len(chosen) >= self._size:
                self._chosen, self.is_over = chosen[: self._size], True
                self.ended(len(self._settled) < self._num_begun)
            elif (missing := self._size - len(chosen) - num_open) > 0:
                self._open(max(missing, self._at_once))

    def rollout(self) -> Rollout:
        """Return the step's samples, and where the prompts go on: after the last group that it needed."""
        pairs = [
            (sample, own)
            for place in self._chosen
            for sample, own in zip(self._settled[place].samples, self._settled[place].owns, strict=True)
        ]
        left = self.ids.after(self._chosen[-1] + 1)
        return Rollout(
            [sample for sample, _ in pairs],
            left.next_new,
            left.unfinished,
            metrics=filter_metrics(self._dropped()),
            owns=tuple(own for _, own in pairs),
        )

    def _open(self, num: int) -> None:
        for _ in range(num):
            self._num_begun += 1
            self._begin(self, self._num_begun - 1)

    def _look(self) -> tuple[list[int], int, int]:
        """Return the groups that the step takes for certain, how many are dropped, how many may still come.

        The order decides: a group counts once all before it are settled.
        """
        chosen: list[int] = []
        num_dropped = num_open = 0
        spare = max(0, self._num_begun - self._size)  # so many may be dropped and still fill the step
        is_certain = True
        for place in range(self._num_begun):
            settled = self._settled.get(place)
            if settled is None:
                is_certain = False
                num_open += 1
            elif settled.judgement.keep or (settled.judgement.fills and num_dropped >= spare):
                if is_certain:
                    chosen.append(place)
                else:
                    num_open += 1
            else:
                num_dropped += 1
        return chosen, num_dropped, num_open

    def _dropped(self) -> Counter[str]:
        """Return the groups that were dropped before the last that the step takes, by reason."""
        last = self._chosen[-1] if self._chosen else self._num_begun
        return Counter(
            settled.judgement.reason
            for place, settled in sorted(self._settled.items())
            if place < last and place not in self._chosen and not settled.judgement.keep
        )

    def _report(self) -> None:
        kept = sum(settled.judgement.keep for settled in self._settled.values())
        self._progress(min(kept, self._size) * self._num_samples, self._size * self._num_samples)
