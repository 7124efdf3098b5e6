"""FunctionGroups makes a prompt's group of samples by calling the user's function once for each of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from slime_spec.agents.as_slime import new_sample
from slime_spec.agents.client import Client, SaidInGroup, TurnSettings
from slime_spec.agents.function_thread import FunctionThread, Turns
from slime_spec.agents.hooks import hooked
from slime_spec.agents.own import OwnFunction, takes
from slime_spec.agents.returned import Asked, Made, failed, made_of
from slime_spec.checkpoints.tokenizer import Tokenizer
from slime_spec.config.schema import by_flag
from slime_spec.config.speculation import reads_replies
from slime_spec.config.tree import Config
from slime_spec.errors import RAISED_IN_THREADS
from slime_spec.interfaces import RunState
from slime_spec.preflight.requests import RequestLimits
from slime_spec.request_feed import RequestFeed
from slime_spec.rl.requests import sampling_params
from slime_spec.slime_sample import Args
from slime_spec.tasks.judge import told_of
from slime_spec.types import GeneratedSample, Prompt


class FunctionGroups:
    """Implements Groups by ``function(args, sample, sampling_params)``; each call costs at most its own sample.

    A function that has a parameter ``client`` gets its sample's Client by that name, and one that has ``evaluation``
    whether the sample is evaluated. ``hooks`` change what it returns (slime_spec.agents.hooks).
    """

    def __init__(
        self,
        config: Config,
        function: OwnFunction,
        tokenizer: Tokenizer,
        clock: Callable[[], float] = time.monotonic,
        evaluates: bool = False,
        hooks: Sequence[OwnFunction] = (),
    ) -> None:
        custom = config.custom
        self._name = custom.generate or " ".join(custom.sample_hooks)
        assert self._name, "settings name the functions"
        self._config, self._function, self._tokenizer, self._clock = config, function, tokenizer, clock
        self._args, self._evaluates, self._hooks = Args(**by_flag(config)), evaluates, hooks
        self._thread = FunctionThread(self._name, custom.generate_timeout_s, clock)
        self._at_once = asyncio.Semaphore(custom.generate_concurrency)
        self._tasks: list[Future[list[Made]]] = []

    def begin_step(self, feed: RequestFeed, state: RunState) -> None:
        self._turns = Turns(feed)
        self._state = state

    def begin(self, prompt: Prompt) -> Future[list[Made]]:
        task = self._thread.start(self._group(prompt, self._turns))
        self._tasks.append(task)
        return task

    def arrived(self, response: GeneratedSample) -> None:
        self._turns.arrived(response)

    def check(self) -> None:
        self._thread.check()

    def end_step(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    def close(self) -> None:
        self.end_step()
        self._thread.close()

    async def _group(self, prompt: Prompt, turns: Turns) -> list[Made]:
        settings = turn_settings(self._config, self._tokenizer, turns, self._clock)
        said = SaidInGroup() if reads_replies(self._config) else None
        clients = (Client(settings, prompt, i, said=said) for i in range(self._config.rollout.n_samples_per_prompt))
        of_samples = await asyncio.gather(*(self._one(prompt, client) for client in clients))
        return [made for each in of_samples for made in each]

    async def _one(self, prompt: Prompt, client: Client) -> list[Made]:
        """Return the samples of one call; where it fails, one without a response, and why."""
        custom = self._config.custom
        limits = client.settings.limits
        version = self._state.weight_version
        asked = Asked(prompt, client.sample_index, version, limits.vocab_size, limits.context_length)
        async with self._at_once:
            begun = self._clock()
            call = asyncio.create_task(self._call(prompt, client))
            try:
                # Not asyncio.timeout, which waits for a function that takes no cancellation.
                await asyncio.wait({call}, timeout=custom.generate_timeout_s)
            finally:
                call.cancel()
            passed_s = self._clock() - begun
            asked = replace(asked, e2e_latency_s=passed_s)
            if not call.done():
                limit = f"{custom.generate_timeout_s:g} s (--custom-generate-timeout)"
                return [failed(asked, f"{self._name} gave no sample within {limit}")]
            try:
                asked_in_time = replace(asked, outside_s=max(0.0, passed_s - client.waited_s))
                return made_of(_unless_raised(call.result()), client.turns, asked_in_time)
            except RAISED_IN_THREADS as error:
                return [failed(asked, f"{self._name}: {told_of(error, __file__)}")]

    async def _call(self, prompt: Prompt, client: Client) -> Any:
        """Return what the function returns, or in _Raised what ends an event loop where a task raises it."""
        rollout = self._config.rollout
        sample = new_sample(prompt, client.sample_index)
        params = {
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "min_p": rollout.min_p,
            "max_new_tokens": rollout.max_response_len,
            "stop": list(rollout.stop),
            "stop_token_ids": list(rollout.stop_token_ids),
        }
        besides: dict[str, Any] = {}
        if takes(self._function, "client"):
            besides["client"] = client
        if takes(self._function, "evaluation"):
            besides["evaluation"] = self._evaluates
        try:
            made = await self._function(self._args, sample, params, **besides)
            return await hooked(self._hooks, self._args, made, self._state.rollout_id, self._evaluates)
        except (SystemExit, KeyboardInterrupt) as error:
            return _Raised(error)


@dataclass(frozen=True)
class _Raised:
    """Holds an exception that a task must not raise."""

    error: BaseException


def _unless_raised(given: Any) -> Any:
    if isinstance(given, _Raised):
        raise given.error
    return given


def turn_settings(config: Config, tokenizer: Tokenizer, turns: Turns, clock: Callable[[], float]) -> TurnSettings:
    limits = RequestLimits(tokenizer.vocab_size, config.rollout.longest, config.speculative.algorithm)
    speculative = config.speculative
    edit = speculative.edit and speculative.record.takes_advice
    params = replace(sampling_params(config.rollout), edit=edit)
    return TurnSettings(tokenizer, params, limits, config.run.seed, turns.submit, clock)
