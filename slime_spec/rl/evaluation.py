"""An Evaluation generates and scores the run's evaluation sets with the weights that the engines serve.

    step s due? ─► every set's groups, in one generation ─► samples with rewards ─► metrics eval/*, eval/step_s.jsonl
                                                                                      │
    rollout of step s, with the same weights ─► train ─► push ─► the metrics of step s ◄┘

The prompts, seeds and order of training do not depend on evaluations: their requests have group ids and seeds of their
own, none of their replies is drafted from later, and they run while no other generation does. The unfinished samples of
a partial rollout wait at the driver meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from slime_spec.config.evaluation import EvalConfig
from slime_spec.errors import RewardError
from slime_spec.interfaces import Engines, RunState
from slime_spec.metrics.evaluation import evaluation_metrics, facts
from slime_spec.rl.clock import PhaseClock
from slime_spec.rl.expected_length import ExpectedLengths
from slime_spec.rl.open_group import OpenGroup
from slime_spec.rl.requests import group_requests
from slime_spec.rl.rollouts import Progress, RolloutSource
from slime_spec.tasks.eval_prompts import EvalPrompts
from slime_spec.types import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """Holds what one set came to: its metrics, by the table's names, and its samples in (prompt, sample) order."""

    name: str
    metrics: Mapping[str, float]
    samples: Sequence[Sample]


class Evaluation:
    """Evaluates weights on sets of prompts, each weights once. Example::

    evaluation = Evaluation(config.eval, sets, engines, keep)
    if evaluation.is_due(state.rollout_id, state.weight_version, num_steps=30):
        metrics = evaluation.evaluate(state.rollout_id, state.weight_version, progress)

    ``keep(step, evaluated)`` keeps the samples and the metrics for readers. ``own_sources`` make the samples of a set,
    by its name, where a function of the user's own makes them; each gives a set's prompts as one step.
    """

    def __init__(
        self,
        settings: EvalConfig,
        sets: Sequence[EvalPrompts],
        engines: Engines,
        keep: Callable[[int, Sequence[Evaluated]], None],
        own_sources: Mapping[str, RolloutSource] = MappingProxyType({}),
    ) -> None:
        self._settings, self._sets, self._engines, self._keep = settings, sets, engines, keep
        self._own_sources = own_sources
        self._lengths = ExpectedLengths()
        self._last: tuple[int, int] | None = None  # step and version of the last evaluation

    def is_due(self, step: int, version: int, num_steps: int) -> bool:
        """Return whether the weights before ``step`` are to be evaluated; after the last step, those at the end."""
        if self._settings.interval is None or (step == 0 and self._settings.skip_before_train):
            return False
        is_asked = step % self._settings.interval == 0 or step == num_steps
        if is_asked and self._last is not None and self._last[1] == version:
            logger.info("not evaluated again, weights are those of step=%d version=%d", self._last[0], version)
            return False
        return is_asked

    def evaluate(self, step: int, version: int, progress: Progress) -> dict[str, float]:
        """Evaluate every set and return the metrics; raises RewardError for a set of which no sample has a reward."""
        clock = PhaseClock()
        with clock.phase("eval"):
            results = self._of_functions(step, version, progress) if self._own_sources else self.run(progress)
        self._last = (step, version)
        self._keep(step, results)
        for each in results:
            logger.info("evaluated step=%d set=%s %s", step, each.name, facts(each.name, each.metrics))
            _check_rewards(step, each)
        metrics = {name: value for each in results for name, value in each.metrics.items()}
        return {**metrics, "perf/eval_time": clock.seconds["eval"]}

    def run(self, progress: Progress) -> list[Evaluated]:
        """Generate and score the samples of all sets, in one generation, the longest expected replies first."""
        of_sets = [_groups(each) for each in self._sets]
        groups = {
            group.request.group_id: (prompts, group)
            for prompts, of_set in zip(self._sets, of_sets, strict=True)
            for group in of_set
        }
        wanted = sum(len(group.request.seeds) for _, group in groups.values())
        progress(0, wanted)
        ordered = self._lengths.longest_first(group for _, group in groups.values())
        for number, response in enumerate(self._engines.generate([each.request for each in ordered]), start=1):
            prompts, group = groups[response.group_id]
            group.finish(response)
            if group.is_complete:
                self._lengths.note(group.prompt, group.finished)
                group.scored = prompts.score(group.prompt, group.finished)
            progress(number, wanted)
        return [_evaluated(prompts, _scored(of_set)) for prompts, of_set in zip(self._sets, of_sets, strict=True)]

    def _of_functions(self, step: int, version: int, progress: Progress) -> list[Evaluated]:
        """Have a function of the user's own make the samples, a set after the other."""
        results = []
        for prompts in self._sets:
            state = RunState(rollout_id=step, next_prompt_id=0, weight_version=version)
            samples = self._own_sources[prompts.name].rollout(state, progress).samples
            results.append(_evaluated(prompts, samples))
        return results


def _groups(prompts: EvalPrompts) -> list[OpenGroup]:
    """Return a group of each prompt, whose id no group of training and no other set has."""
    requests = group_requests(prompts.prompts, prompts.rollout, prompts.seed)
    return [
        OpenGroup(prompt, replace(request, group_id=f"eval-{prompts.name}-{request.group_id}"))
        for prompt, request in zip(prompts.prompts, requests, strict=True)
    ]


def _scored(groups: Sequence[OpenGroup]) -> list[Sample]:
    samples = []
    for group in groups:
        assert group.scored is not None, "every group is complete when the generation ends"
        samples += sorted(group.scored(), key=lambda sample: sample.response.sample_index)
    return samples


def _evaluated(prompts: EvalPrompts, samples: Sequence[Sample]) -> Evaluated:
    metrics = evaluation_metrics(prompts.name, samples, prompts.rollout.n_samples_per_prompt)
    return Evaluated(prompts.name, metrics, samples)


def _check_rewards(step: int, evaluated: Evaluated) -> None:
    """Raise RewardError where no sample of a set has a reward, as a step of training does."""
    samples = evaluated.samples
    if all(sample.reward is None for sample in samples):
        raise RewardError(
            f"no sample of the evaluation {evaluated.name} at step {step} has a reward ({len(samples)} samples): "
            f"{samples[-1].error}"
        )
