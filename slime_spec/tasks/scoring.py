"""``score`` makes a scored sample of a response; a reward that fails costs that sample, not the run."""

from __future__ import annotations

import logging
import math

from slime_spec.tasks.rewards import Reward
from slime_spec.types import GeneratedSample, Prompt, Sample

logger = logging.getLogger(__name__)


def score(reward: Reward, prompt: Prompt, response: GeneratedSample, text: str) -> Sample:
    """Return the sample with its reward, or with ``reward=None`` and the reason it is excluded from training.

    Excluded are responses that were aborted and replies whose reward raises or is not a finite number.
    """
    if response.finish_reason == "abort":
        return Sample(prompt, response, text, None, "the response was aborted before it finished")
    try:
        given = reward(prompt, text)
    except Exception as error:  # noqa: BLE001 - a user's function may raise anything, and the run must go on
        return _excluded(prompt, response, text, f"the reward raised {type(error).__name__}: {error}")
    number = _finite(given)
    if number is None:
        return _excluded(prompt, response, text, f"the reward must be a finite number, it was {given!r}")
    return Sample(prompt, response, text, number)


def _excluded(prompt: Prompt, response: GeneratedSample, text: str, error: str) -> Sample:
    logger.warning(
        "excluded sample task=%s prompt_id=%d sample=%d error=%r",
        prompt.task,
        prompt.prompt_id,
        response.sample_index,
        error,
    )
    return Sample(prompt, response, text, None, error)


def _finite(given: object) -> float | None:
    """Return a number, a bool, or a scalar of numpy or torch as a float.

    None for anything else (a text is not a number).
    """
    if not hasattr(given, "__float__"):
        return None
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array or tensor of several numbers
        return None
    return number if math.isfinite(number) else None
