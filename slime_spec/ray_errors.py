"""Get the results of actors' methods, with one rule for their errors."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError

from slime_spec.errors import ConfigError, GenerationError, PushError, TrainingError


def result_of(refs: Any, timeout_s: float | None = None) -> Any:
    """Return the value of a reference, or of a list of them; raises Ray's GetTimeoutError after ``timeout_s``.

    An error that a user reads (slime_spec.errors) is raised as itself, not as Ray wraps it. Any other keeps the
    wrapping, which is an instance of the error's class too and has the actor's traceback.
    """
    try:
        return ray.get(refs, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError | GenerationError | PushError | TrainingError):
            raise error.cause from None
        raise
