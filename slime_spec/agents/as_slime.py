"""Samples as functions of a user's own see them, and what such functions change of them."""

from __future__ import annotations

from typing import Any

from slime_spec.tasks.judge import Reply
from slime_spec.types import Sample


def as_slime(sample: Sample, own: Any = None) -> Any:
    """Return slime's Sample of a scored sample: the object that a function made, or else a new one."""
    made = own
    if made is None:
        made = Reply(sample.prompt, sample.response, sample.text).for_slime()
        made.loss_mask = list(sample.response.loss_mask) or [1] * len(sample.response.token_ids)
        made.rollout_log_probs = list(sample.response.logprobs)
    if made.reward is None or own is None:
        made.reward = sample.reward
    return made
