"""A rollout source gives a step's samples: from the engines, or from a saved rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from slime_spec.config.speculation import reads_replies
from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError, CustomFunctionError
from slime_spec.interfaces import Engines, RunState
from slime_spec.rl.expected_length import ExpectedLengths
from slime_spec.rl.open_group import OpenGroup
from slime_spec.rl.reply_history import ReplyHistory
from slime_spec.rl.requests import group_requests
from slime_spec.tasks.scoring import PendingSamples
from slime_spec.types import GeneratedSample, Prompt, Sample

Progress = Callable[[int, int], None]  # (samples finished, samples wanted)


@dataclass(frozen=True)
class Rollout:
    """Holds one step's samples, in (prompt, sample) order, and where the run's prompts stand after the step.

    ``owns`` are the samples as functions of the user's own see them, or nothing; ``advantages`` are what such a
    function gave, one for each sample (None without a reward), or None.
    """

    samples: list[Sample]
    next_prompt_id: int
    unfinished_prompt_ids: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    owns: tuple[Any, ...] = ()
    advantages: tuple[float | None, ...] | None = None


class SamplesRefused(CustomFunctionError):
    """A function of the user's own failed on samples that were made; ``samples`` are kept before the run ends."""

    def __init__(self, message: str, samples: list[Sample]) -> None:
        super().__init__(message)
        self.samples = samples


class RolloutSource(Protocol):
    """Gives one step's scored samples; raises SamplesRefused where it has samples that cannot be trained on."""

    def rollout(self, state: RunState, progress: Progress) -> Rollout: ...


@dataclass(frozen=True)
class PromptIds:
    """Gives the ids of the prompts that a step may take, by place: those that earlier steps left, then new ones.

    E.g. ``PromptIds((7, 9), next_new=12)`` is 7, 9, 12, 13, ...
    """

    unfinished: tuple[int, ...]
    next_new: int

    @classmethod
    def of(cls, state: RunState) -> PromptIds:
        return cls(tuple(sorted(state.unfinished_prompt_ids)), state.next_prompt_id)

    def __getitem__(self, place: int) -> int:
        num_left = len(self.unfinished)
        return self.unfinished[place] if place < num_left else self.next_new + place - num_left

    def after(self, num_taken: int) -> PromptIds:
        """Return what is left where the first ``num_taken`` are taken."""
        return PromptIds(self.unfinished[num_taken:], self.next_new + max(0, num_taken - len(self.unfinished)))


class GeneratedRollouts:
    """Gives samples that the engines generate.

    With ``rollout.over_sampling_batch_size`` more groups are in progress than a step trains on: it ends with the first
    ``batch_size`` that are complete, the others are aborted and go on in the next step (partial rollout; slime's
    settings). Which these are depends on time, so two such runs need not train on the same steps. What was generated of
    them stays here: a resumed run generates them anew, from the prompt ids in its state.

    ``take_prompts(n, start)`` gives the n prompts from an id on; ``score(prompt, responses)`` begins to score a
    complete group, while others are generated. Where the algorithm drafts from earlier replies, the latest replies to
    every prompt stay here and go with its next request: an engine that was restarted has them again. A resumed run
    begins without any. Engines get the groups that are expected to take longest first.
    """

    def __init__(
        self,
        config: Config,
        engines: Engines,
        take_prompts: Callable[[int, int], Sequence[Prompt]],
        score: Callable[[Prompt, Sequence[GeneratedSample]], PendingSamples],
    ) -> None:
        self._config, self._engines, self._take_prompts, self._score = config, engines, take_prompts, score
        self._open: dict[int, OpenGroup] = {}
        self._history = ReplyHistory() if reads_replies(config) else None
        self._lengths = ExpectedLengths()

    def rollout(self, state: RunState, progress: Progress) -> Rollout:
        """Generate and score one step."""
        next_prompt_id = self._open_groups(state)
        complete = self._complete_groups(progress)
        self._open = {prompt_id: group for prompt_id, group in self._open.items() if prompt_id not in complete}
        if self._history is not None:
            for group in complete.values():
                self._history.note(group.request.prompt_token_ids, group.finished)
        samples = [sample for group in complete.values() for sample in _scored(group)]
        samples.sort(key=lambda sample: (sample.prompt.prompt_id, sample.response.sample_index))
        return Rollout(samples, next_prompt_id, tuple(self._open))

    def _open_groups(self, state: RunState) -> int:
        """Open groups, unfinished ones first, up to the number in progress; returns the next new prompt's id."""
        rollout = self._config.rollout
        ids = [prompt_id for prompt_id in state.unfinished_prompt_ids if prompt_id not in self._open]
        prompts = [prompt for prompt_id in ids for prompt in self._take_prompts(1, prompt_id)]
        num_known = len(self._open) + len(ids)
        num_new = max(0, (rollout.over_sampling_batch_size or rollout.batch_size) - num_known)
        prompts += self._take_prompts(num_new, state.next_prompt_id)
        speculative = self._config.speculative
        edit = speculative.edit and speculative.record.takes_advice
        requests = group_requests(prompts, rollout, self._config.run.seed, edit)
        for prompt, request in zip(prompts, requests, strict=True):
            if self._history is not None:
                request = replace(request, earlier=self._history.of(request.prompt_token_ids))
            self._open[prompt.prompt_id] = OpenGroup(prompt, request, shares_replies=self._history is not None)
        return state.next_prompt_id + num_new

    def _complete_groups(self, progress: Progress) -> dict[int, OpenGroup]:
        """Generate until a batch of the open groups is complete."""
        size = self._config.rollout.batch_size
        groups = {group.request.group_id: group for group in self._open.values()}
        complete = {group.prompt.prompt_id: group for group in groups.values() if group.is_complete}
        wanted = size * self._config.rollout.n_samples_per_prompt
        num_finished = sum(len(group.finished) for group in groups.values())
        progress(min(num_finished, wanted), wanted)
        is_aborted = False
        if len(complete) < size:
            unfinished = self._lengths.longest_first(each for each in groups.values() if not each.is_complete)
            for response in self._engines.generate([each.rest() for each in unfinished]):
                group = groups[response.group_id]
                if is_aborted and response.finish_reason == "abort":
                    group.partials[response.sample_index] = response
                    continue
                group.finish(response)
                num_finished += 1
                progress(min(num_finished, wanted), wanted)
                if group.is_complete:
                    self._lengths.note(group.prompt, group.finished)
                    group.scored = self._score(group.prompt, group.finished)
                    complete[group.prompt.prompt_id] = group
                if len(complete) == size < len(groups) and not is_aborted:
                    is_aborted = True
                    self._engines.abort()
        return dict(list(complete.items())[:size])


def _scored(group: OpenGroup) -> list[Sample]:
    assert group.scored is not None, "a group is scored when it is complete"
    return group.scored()


class SavedRollouts:
    """Gives samples of an earlier run, for train_only; ``load(rollout_id)`` reads one step's samples."""

    def __init__(self, load: Callable[[int], list[Sample]]) -> None:
        self._load = load

    def rollout(self, state: RunState, progress: Progress) -> Rollout:
        loaded = self._load(state.rollout_id)
        if num_lossy := sum(sample.response.lossy for sample in loaded):
            raise ConfigError(
                "run.load_debug_rollout_data",
                f"{num_lossy} samples of rollout {state.rollout_id} were verified lossily and are no policy's",
                "lossy",
                "Generate them again without --speculative-lossy.",
            )
        progress(len(loaded), len(loaded))
        return Rollout(loaded, state.next_prompt_id + len({sample.prompt.prompt_id for sample in loaded}))
