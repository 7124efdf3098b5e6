"""What functions of the user's own do with a step's samples: which count in the loss, with what advantage; a log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from slime_spec.agents.as_slime import as_slime
from slime_spec.agents.own import OwnFunction
from slime_spec.errors import RAISED_BY_FUNCTIONS, CustomFunctionError, raised, shown
from slime_spec.interfaces import RunState
from slime_spec.rl.evaluation import Evaluated
from slime_spec.rl.rollouts import Progress, Rollout, RolloutSource, SamplesRefused
from slime_spec.slime_sample import Args
from slime_spec.types import Sample

logger = logging.getLogger(__name__)


class CustomRollouts:
    """Implements RolloutSource by another one, whose samples go through a user's filter, advantages and log.

    The log function changes nothing, also where it fails: the run's own metrics are written in any case.
    """

    def __init__(
        self,
        source: RolloutSource,
        args: Args,
        sample_filter: OwnFunction | None = None,
        reward_post_process: OwnFunction | None = None,
        rollout_log: OwnFunction | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._args, self._clock = source, args, clock
        self._filter, self._post_process, self._log = sample_filter, reward_post_process, rollout_log

    def rollout(self, state: RunState, progress: Progress) -> Rollout:
        """Give one step of the other source; raises SamplesRefused where a filter or advantages fail."""
        begun = self._clock()
        rollout = self._source.rollout(state, progress)
        passed_s = self._clock() - begun
        owns = rollout.owns or tuple(map(as_slime, rollout.samples))
        samples, advantages = rollout.samples, rollout.advantages
        try:
            if self._filter is not None:
                samples = self._filtered(samples, owns)
            if self._post_process is not None:
                advantages = self._advantages(samples, owns)
        except CustomFunctionError as error:
            raise SamplesRefused(str(error), rollout.samples) from error
        if self._log is not None:
            extra = dict(rollout.metrics)
            try:
                _called("custom_rollout_log", self._log, state.rollout_id, self._args, list(owns), extra, passed_s)
            except CustomFunctionError as error:
                logger.warning("step %d was not logged: %s", state.rollout_id, error)
        return replace(rollout, samples=samples, owns=owns, advantages=advantages)

    def _filtered(self, samples: Sequence[Sample], owns: Sequence[Any]) -> list[Sample]:
        """Return the samples, of which those with remove_sample do not count in the loss.

        The filter sees those with a reward: one that failed has nothing to be judged by.
        """
        assert self._filter is not None, "it is asked for where there is one"
        pairs = list(zip(samples, owns, strict=True))
        scored = [pair for pair in pairs if pair[0].reward is not None]
        groups = [[own for _, own in group] for _, group in groupby(scored, lambda pair: pair[0].prompt.prompt_id)]
        _called("rollout_sample_filter", self._filter, self._args, groups)
        return [
            replace(sample, response=replace(sample.response, loss_mask=(0,) * len(sample.response.token_ids)))
            if getattr(own, "remove_sample", False)
            else sample
            for sample, own in pairs
        ]

    def _advantages(self, samples: Sequence[Sample], owns: Sequence[Any]) -> tuple[float | None, ...]:
        """Return an advantage for each scored sample, None for the others."""
        assert self._post_process is not None, "it is asked for where there is one"
        scored = [own for sample, own in zip(samples, owns, strict=True) if sample.reward is not None]
        given = _called("custom_reward_post_process", self._post_process, self._args, scored)
        try:
            _, advantages = given
            numbers = [float(each) for each in advantages]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(scored) or not all(map(math.isfinite, numbers)):
            raise CustomFunctionError(
                "custom_reward_post_process must return (raw rewards, advantages), with a finite number for each of "
                f"{len(scored)} samples; it was {shown(given)}"
            )
        left = iter(numbers)
        return tuple(None if sample.reward is None else next(left) for sample in samples)


def log_evaluation(log: OwnFunction, args: Args, step: int, evaluated: Sequence[Evaluated]) -> None:
    """Give an evaluation's samples to a user's log function, in slime's form; one that fails changes nothing."""
    data: dict[str, dict[str, Any]] = {}
    for each in evaluated:
        owns = list(map(as_slime, each.samples))
        rewards = [sample.reward for sample in each.samples]
        truncated = [sample.response.finish_reason == "length" for sample in each.samples]
        data[each.name] = {"rewards": rewards, "truncated": truncated, "samples": owns}
    metrics = {name: value for each in evaluated for name, value in each.metrics.items()}
    try:
        _called("custom_eval_rollout_log", log, step, args, data, metrics)
    except CustomFunctionError as error:
        logger.warning("the evaluation at step %d was not logged: %s", step, error)


def _called(name: str, function: OwnFunction, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except RAISED_BY_FUNCTIONS as error:
        raise CustomFunctionError(f"{name} raised {raised(error)}") from error
