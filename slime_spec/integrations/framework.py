"""A framework is named by where its functions are: they are imported when they are called, never before."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from slime_spec.errors import ConfigError

LOG_PATHS = ("custom_rollout_log_function_path", "custom_eval_rollout_log_function_path")
ALGORITHM = "sglang_speculative_algorithm"
Generate = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class Framework:
    """Names a framework's functions as ``module.function``, of its newest version first.

    ``log_rollout`` and ``log_eval`` are those that call the functions of the user's own for logs.
    """

    name: str
    generate: tuple[str, ...]
    log_rollout: tuple[str, ...]
    log_eval: tuple[str, ...]

    def can_log(self, args: Any) -> bool:
        """Return whether ``args`` are those of the framework's parser, which its log functions read."""
        return all(hasattr(args, path) for path in LOG_PATHS)

    def log(self, paths: tuple[str, ...], args: Any, extra: Mapping[str, Any], call: Callable[..., Any]) -> None:
        """Have the framework log all that it logs by itself, and ``extra``.

        ``call`` hands its log function the arguments. Its args say that nothing speculates: then it has no acceptance
        of its own, a mean of ratios under the names that ``extra`` has.
        """
        quiet = copy.copy(args)
        for path in LOG_PATHS:
            setattr(quiet, path, None)
        setattr(quiet, ALGORITHM, None)
        call(first_of(self.name, paths), quiet, dict(extra))


SLIME = Framework(
    "slime",
    generate=("slime.rollout.sglang_rollout.generate",),
    log_rollout=("slime.observability.rollout_metrics.log_rollout_data", "slime.ray.rollout._log_rollout_data"),
    log_eval=("slime.observability.rollout_metrics.log_eval_rollout_data", "slime.ray.rollout._log_eval_rollout_data"),
)
MILES = Framework(
    "miles",
    generate=("miles.rollout.sglang_rollout.generate",),
    log_rollout=("miles.ray.rollout.metrics.log_rollout_data",),
    log_eval=("miles.ray.rollout.metrics.log_eval_rollout_data",),
)


@cache
def first_of(framework: str, paths: tuple[str, ...]) -> Callable[..., Any]:
    """Return the first of the functions that there is; raises ConfigError where this version has none."""
    for path in paths:
        module, _, name = path.rpartition(".")
        try:
            found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the framework is there, and lacks something of its own
            continue
        if found is not None:
            return found
    remedy = f"Install {framework} (docs/plug-in-frameworks.md lists the versions), in the environment that runs this."
    raise ConfigError(framework, "must have one of the functions that the plug-in calls", ", ".join(paths), remedy)


@cache
def own_generate(path: str) -> Generate:
    """Return the function of the user's own that generates, ``module.function`` or ``module:function``."""
    module, _, name = path.replace(":", ".").rpartition(".")
    remedy = "Name an async function generate(args, sample, sampling_params)."
    try:
        found: Generate = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError("slime_spec.generate", f"must name a function: {error}", path, remedy) from None
    return found


async def generated(function: Generate, args: Any, sample: Any, sampling_params: Any, evaluation: bool) -> Any:
    """Return what a generate function makes; it learns whether this is an evaluation where it asks for it."""
    if "evaluation" in inspect.signature(function).parameters:
        return await function(args, sample, sampling_params, evaluation=evaluation)
    return await function(args, sample, sampling_params)
