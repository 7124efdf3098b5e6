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
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from slime_spec.agents.as_slime import as_slime
from slime_spec.agents.returned import Made
from slime_spec.config.tree import Config
from slime_spec.errors import CustomFunctionError
from slime_spec.interfaces import Engines, RunState
from slime_spec.metrics.rollout import filter_metrics
from slime_spec.request_feed import RequestFeed
from slime_spec.rl.dynamic_filter import Filter, Judgement, keep_all
from slime_spec.rl.groups import Groups
from slime_spec.rl.rollouts import Progress, Rollout, warn_of_unfinished
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
        warn_of_unfinished(state)
        feed = RequestFeed(self._groups.check)
        self._groups.begin_step(feed, state)
        threads = ThreadPoolExecutor(NUM_WAITING_THREADS, thread_name_prefix="rollout")
        step = _Step(self._config, state.next_prompt_id, self._begin(threads, feed), progress)
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

    def _begin(self, threads: ThreadPoolExecutor, feed: RequestFeed) -> Callable[[_Step, int], None]:
        """Return what begins a prompt's group, and settles it in the step when it is complete."""

        def settle(step: _Step, prompt: Prompt, made: list[Made]) -> None:
            try:
                step.settle(prompt.prompt_id, self._settled(prompt, made))
            except BaseException as error:  # noqa: BLE001 - the main thread raises it
                feed.fail(error)

        def complete(step: _Step, prompt: Prompt, group: Future[list[Made]]) -> None:
            try:
                made = group.result()
            except (CancelledError, Exception) as error:  # noqa: BLE001 - the main thread raises it
                if not step.is_over:
                    feed.fail(error)
                return
            if not step.is_over:
                threads.submit(settle, step, prompt, made)

        def begin(step: _Step, prompt_id: int) -> None:
            (prompt,) = self._take_prompts(1, prompt_id)
            self._groups.begin(prompt).add_done_callback(lambda group: complete(step, prompt, group))

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
    """Knows which groups of a step are begun, settled and needed; every method may be called from any thread."""

    def __init__(
        self, config: Config, first_prompt_id: int, begin: Callable[[_Step, int], None], progress: Progress
    ) -> None:
        rollout = config.rollout
        self._size, self._at_once = rollout.batch_size, rollout.over_sampling_batch_size or 0
        self._num_samples = rollout.n_samples_per_prompt
        self._first, self._next, self._begin, self._progress = first_prompt_id, first_prompt_id, begin, progress
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

    def settle(self, prompt_id: int, settled: Settled) -> None:
        """Note a group's samples; begin other groups, or end the step, where this decides it."""
        with self._lock:
            if self.is_over:
                return
            self._settled[prompt_id] = settled
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
                self.ended(len(self._settled) < self._next - self._first)
            elif (missing := self._size - len(chosen) - num_open) > 0:
                self._open(max(missing, self._at_once))

    def rollout(self) -> Rollout:
        """Return the step's samples, and where the prompts go on: after the last group that it needed."""
        pairs = [
            (sample, own)
            for prompt_id in self._chosen
            for sample, own in zip(self._settled[prompt_id].samples, self._settled[prompt_id].owns, strict=True)
        ]
        return Rollout(
            [sample for sample, _ in pairs],
            self._chosen[-1] + 1,
            metrics=filter_metrics(self._dropped()),
            owns=tuple(own for _, own in pairs),
        )

    def _open(self, num: int) -> None:
        for _ in range(num):
            self._next += 1
            self._begin(self, self._next - 1)

    def _look(self) -> tuple[list[int], int, int]:
        """Return the groups that the step takes for certain, how many are dropped, how many may still come.

        The order decides: a group counts once all before it are settled.
        """
        chosen: list[int] = []
        num_dropped = num_open = 0
        spare = max(0, self._next - self._first - self._size)  # so many may be dropped and still fill the step
        is_certain = True
        for prompt_id in range(self._first, self._next):
            settled = self._settled.get(prompt_id)
            if settled is None:
                is_certain = False
                num_open += 1
            elif settled.judgement.keep or (settled.judgement.fills and num_dropped >= spare):
                if is_certain:
                    chosen.append(prompt_id)
                else:
                    num_open += 1
            else:
                num_dropped += 1
        return chosen, num_dropped, num_open

    def _dropped(self) -> Counter[str]:
        """Return the groups that were dropped before the last that the step takes, by reason."""
        last = self._chosen[-1] if self._chosen else self._next
        return Counter(
            settled.judgement.reason
            for prompt_id, settled in sorted(self._settled.items())
            if prompt_id < last and prompt_id not in self._chosen and not settled.judgement.keep
        )

    def _report(self) -> None:
        kept = sum(settled.judgement.keep for settled in self._settled.values())
        self._progress(min(kept, self._size) * self._num_samples, self._size * self._num_samples)
