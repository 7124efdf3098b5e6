"""Samples as functions of a user's own see them: before anything is generated, and with a reward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slime_spec.slime_sample import Sample as SlimeSample
from slime_spec.slime_sample import Status
from slime_spec.tasks.judge import Reply
from slime_spec.types import GeneratedSample, Prompt, Sample


def as_slime(sample: Sample, own: Any = None) -> Any:
    """Return slime's Sample of a scored sample: the object that a function made, or else a new one."""
    made = own
    if made is None:
        made = Reply(sample.prompt, sample.response, sample.text).for_slime()
        made.loss_mask = list(sample.response.loss_mask) or [1] * len(sample.response.token_ids)
        made.rollout_log_probs = list(sample.response.logprobs)
    if getattr(made, "reward", None) is None or own is None:
        made.reward = sample.reward
    return made


def new_sample(prompt: Prompt, sample_index: int) -> SlimeSample:
    """Return the sample that a function begins with: its prompt as rewards see it, and no response."""
    nothing = GeneratedSample(str(prompt.prompt_id), sample_index, (), (), "stop", 0, len(prompt.token_ids))
    sample: SlimeSample = Reply(prompt, nothing, "").for_slime()
    return replace(sample, status=Status.PENDING, rollout_log_probs=None, loss_mask=None, weight_versions=[])
