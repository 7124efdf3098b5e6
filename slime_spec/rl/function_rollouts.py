"""A step that a rollout function of the user's own makes as a whole, in slime's signature.

function(args, rollout_id, data_source, evaluation=False)        sync, or async
    data_source.get_samples(n)      n prompts' groups of samples: list[list[Sample]]
    data_source.add_samples(groups) groups that a later get_samples gives again, first those that a buffer filter takes
    data_source.client(sample)      the Client of a sample's turns
returns groups of samples with rewards, list[list[Sample]], or an object with samples and metrics
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from slime_spec.agents.as_slime import new_sample
from slime_spec.agents.client import Client, TurnSettings
from slime_spec.agents.daemon_threads import DaemonThreads
from slime_spec.agents.function_groups import turn_settings
from slime_spec.agents.function_thread import NUM_BLOCKING_THREADS, Turns
from slime_spec.agents.own import OwnFunction, takes
from slime_spec.agents.returned import Asked, Made, ReturnedError, failed, made_of
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.tree import Config
from slime_spec.errors import RAISED_IN_THREADS, ConfigError, CustomFunctionError, shown
from slime_spec.interfaces import Engines, RunState
from slime_spec.metrics.table import metric
from slime_spec.request_feed import FeedClosed, RequestFeed
from slime_spec.rl.rollouts import Progress, PromptIds, Rollout
from slime_spec.slime_sample import Args
from slime_spec.tasks.judge import Reply, Verdict, told_of, verdict_of
from slime_spec.tasks.scoring import warn_of
from slime_spec.types import Prompt, Sample

logger = logging.getLogger(__name__)

TakePrompts = Callable[[int, int], Sequence[Prompt]]
SampleGroups = list[list[Any]]


def first_groups(buffer: SampleGroups, num_samples: int) -> SampleGroups:
    """Take the groups that have waited longest out of the buffer."""
    taken, buffer[:] = buffer[:num_samples], buffer[num_samples:]
    return taken


class DataSource:
    """Gives a rollout function prompts, as slime's data source does, and clients for their samples."""

    def __init__(
        self,
        take: Callable[[int], Sequence[Prompt]],
        num_samples: int,
        settings: TurnSettings,
        choose: Callable[[SampleGroups, int], SampleGroups] = first_groups,
    ) -> None:
        self._take, self._num_samples, self._settings, self._choose = take, num_samples, settings, choose
        self._lock = threading.Lock()
        self._clients: dict[tuple[int, int], Client] = {}
        self.prompts: dict[int, Prompt] = {}
        self.returned: SampleGroups = []

    def get_samples(self, num_samples: int) -> SampleGroups:
        """Return so many prompts' groups; those that were added before come first."""
        with self._lock:
            again = self._choose(self.returned, num_samples) if self.returned and num_samples else []
            prompts = self._take(num_samples - len(again))
            self.prompts |= {prompt.prompt_id: prompt for prompt in prompts}
        return again + [[new_sample(prompt, index) for index in range(self._num_samples)] for prompt in prompts]

    def add_samples(self, samples: SampleGroups) -> None:
        """Keep groups for a later step, with their turns so far; a resumed run begins their prompts anew."""
        with self._lock:
            self.returned += samples

    @property
    def returned_prompt_ids(self) -> set[int]:
        """Return the prompts of the groups that were added and not given again."""
        with self._lock:
            ids = {_key(own)[0] for group in self.returned for own in _flat(group)}
        return {each for each in ids if isinstance(each, int)}

    def client(self, sample: Any) -> Client:
        """Return the client of a sample that came from here; the same at each call."""
        key = (int(sample.group_index), int(sample.index))
        with self._lock:
            return self._clients.setdefault(key, Client(self._settings, self.prompts[key[0]], key[1]))

    def resume(self, before: DataSource) -> None:
        """Take over the groups that were added to the step ``before``, their prompts, and their turns so far."""
        with before._lock:
            self.returned = before.returned
            keys = {_key(own) for group in self.returned for own in _flat(group)}
            ids = {prompt_id for prompt_id, _ in keys}
            self.prompts = {each: prompt for each, prompt in before.prompts.items() if each in ids}
            self._clients = {
                key: replace(client, settings=self._settings, turns=list(client.turns), _num_waiting=0)
                for key, client in before._clients.items()
                if key in keys
            }

    def made(self, own: Any, weight_version: int) -> list[Made]:
        """Return what is trained on of a sample that the function returned."""
        group, index = _key(own)
        prompt = self.prompts.get(group) if isinstance(group, int) else None
        if prompt is None or not isinstance(index, int):
            raise CustomFunctionError(
                f"the rollout function returned a sample of no prompt that it got: {shown(group)}"
            )
        limits, client = self._settings.limits, self._clients.get((prompt.prompt_id, index))
        asked = Asked(prompt, index, weight_version, limits.vocab_size, limits.context_length)
        try:
            return made_of(own, [] if client is None else client.turns, asked)
        except ReturnedError as error:
            return [failed(asked, str(error))]


class FunctionRollouts:
    """Implements RolloutSource by a user's rollout function, which runs in a thread beside the engines."""

    def __init__(
        self,
        config: Config,
        engines: Engines,
        take_prompts: TakePrompts,
        function: OwnFunction,
        tokenizer: Tokenizer,
        args: Args,
        buffer_filter: OwnFunction | None = None,
    ) -> None:
        self._buffer_filter = buffer_filter
        self._config, self._engines, self._take_prompts = config, engines, take_prompts
        self._function, self._tokenizer, self._args = function, tokenizer, args
        self._kept: DataSource | None = None

    def rollout(self, state: RunState, progress: Progress) -> Rollout:
        """Call the function once; raises CustomFunctionError where it fails or returns something else."""
        kept = set() if self._kept is None else self._kept.returned_prompt_ids
        unfinished = (each for each in state.unfinished_prompt_ids if each not in kept)
        ids = PromptIds(tuple(sorted(unfinished)), state.next_prompt_id)

        def take(num: int) -> Sequence[Prompt]:
            nonlocal ids
            taken, ids = [ids[place] for place in range(num)], ids.after(num)
            return [prompt for each in taken for prompt in self._take_prompts(1, each)]

        feed = RequestFeed()
        turns = Turns(feed)
        settings = turn_settings(self._config, self._tokenizer, turns, time.monotonic)
        num_samples = self._config.rollout.n_samples_per_prompt
        choose = first_groups if self._buffer_filter is None else self._chosen
        source = DataSource(take, num_samples, settings, choose)
        if self._kept is not None:
            source.resume(self._kept)
        wanted = self._config.rollout.batch_size * num_samples
        progress(0, wanted)
        threads = DaemonThreads(1, "rollout function")
        try:
            responses = self._engines.generate(feed)  # before the function can return: its end aborts this generation
            returned: Future[Any] = threads.submit(self._call, state.rollout_id, source)
            returned.add_done_callback(lambda _: self._end(feed, turns))
            for response in responses:
                turns.arrived(response)
            output = returned.result()
        finally:
            feed.close()
            turns.fail(FeedClosed("the step has ended"))  # or a function that waits for a turn would wait for ever
            threads.shutdown(wait=False, cancel_futures=True)
        self._kept = source
        groups = _groups(getattr(output, "samples", output))
        if len(groups) != self._config.rollout.batch_size:
            text = "the rollout function returned another number of groups than --rollout-batch-size groups=%d asked=%d"
            logger.warning(text, len(groups), self._config.rollout.batch_size)
        samples, owns = self._scored(groups, source, state.weight_version)
        progress(len(samples), wanted)
        metrics = _metrics(getattr(output, "metrics", None))
        left = tuple(sorted({*ids.unfinished, *source.returned_prompt_ids}))
        return Rollout(samples, ids.next_new, left, metrics, tuple(owns))

    def _chosen(self, buffer: SampleGroups, num_samples: int) -> SampleGroups:
        """Return what the user's filter takes out of the buffer, slime's way: it removes it there by itself."""
        assert self._buffer_filter is not None, "it is asked for where there is one"
        chosen = self._buffer_filter(self._args, None, buffer, num_samples)
        if chosen == []:
            return []
        num_groups = len(_groups(chosen, "the buffer filter"))
        if num_groups > num_samples:
            raise CustomFunctionError(f"the buffer filter took {num_groups} groups, and {num_samples} were asked for")
        taken: SampleGroups = chosen
        return taken

    def _end(self, feed: RequestFeed, turns: Turns) -> None:
        """End the generation; turns that the function left behind are aborted."""
        try:
            if turns.has_waiting:
                self._engines.abort()
        finally:
            feed.close()

    def _call(self, rollout_id: int, source: DataSource) -> Any:
        besides = {"evaluation": False} if takes(self._function, "evaluation") else {}
        try:
            output = self._function(self._args, rollout_id, source, **besides)
            return asyncio.run(_awaited(output)) if inspect.isawaitable(output) else output
        except RAISED_IN_THREADS as error:
            name = self._config.custom.rollout
            raise CustomFunctionError(f"{name}: {told_of(error, __file__)}") from None

    def _scored(self, groups: SampleGroups, source: DataSource, version: int) -> tuple[list[Sample], list[Any]]:
        scored = []
        for own in (own for group in groups for own in group):
            for made in source.made(own, version):
                key, text = self._config.task.reward_key, str(own.response)
                verdict = Verdict(None, made.error) if made.error else verdict_of(own.reward, key)
                warn_of(Reply(made.prompt, made.response, text), verdict)
                scored.append((Sample(made.prompt, made.response, text, verdict.reward, verdict.error), own))
        scored.sort(key=lambda pair: (pair[0].prompt.prompt_id, pair[0].response.sample_index))
        return [sample for sample, _ in scored], [own for _, own in scored]


async def _awaited(output: Any) -> Any:
    asyncio.get_running_loop().set_default_executor(DaemonThreads(NUM_BLOCKING_THREADS, "rollout function that blocks"))
    return await output


def _groups(given: Any, who: str = "the rollout function") -> SampleGroups:
    """Return groups of samples, a fanned-out group's in one list; raises CustomFunctionError for anything else."""
    if not isinstance(given, list) or not given or not all(isinstance(group, list) and group for group in given):
        rule = f"{who} must return groups of samples, list[list[Sample]], or an object that has such lists"
        raise CustomFunctionError(f"{rule} as samples; it was {shown(given)}")
    return [_flat(group) for group in given]


def _flat(group: list[Any]) -> list[Any]:
    return [own for each in group for own in (each if isinstance(each, list) else [each])]


def _key(own: Any) -> tuple[Any, Any]:
    """Return the prompt and the place in its group of a sample, as far as it says."""
    return getattr(own, "group_index", None), getattr(own, "index", None)


def _metrics(given: Any) -> dict[str, float]:
    """Return the metrics that have a row in the table; the others are logged."""
    known, others = {}, {}
    for name, value in dict(given or {}).items():
        try:
            metric(str(name))
            known[str(name)] = float(value)
        except (ConfigError, TypeError, ValueError):
            others[name] = value
    if others:
        logger.info("metrics of the rollout function, which are in no table: %s", others)
    return known
