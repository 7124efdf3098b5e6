"""Functions of a user's own are loaded by name and looked at before anything heavy starts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from slime_spec.config.custom_checks import SLIMES_DEFAULT
from slime_spec.config.tree import Config, CustomConfig
from slime_spec.errors import ConfigError, raise_all, refused_by
from slime_spec.tasks.rewards import load_attribute

OwnFunction = Callable[..., Any]

# Filters that slime ships, under the names that its scripts give, and what each is here.
NONZERO_STD, WITH_FALLBACK = "nonzero_std", "nonzero_std_with_fallback"
SLIMES_FILTERS = "slime.rollout.filter_hub.dynamic_sampling_filters"
FILTERS = {
    NONZERO_STD: NONZERO_STD,
    WITH_FALLBACK: WITH_FALLBACK,
    f"{SLIMES_FILTERS}.check_reward_nonzero_std": NONZERO_STD,
    f"{SLIMES_FILTERS}.check_reward_nonzero_std_with_fallback": WITH_FALLBACK,
}
ABSENT_SLIME = re.compile(r"No module named 'slime['.]")
WITHOUT_SLIME = (
    "Write `from slime_spec.agents import Sample`, which has the attributes of slime's, and ask the client for turns "
    "in place of GenerateState and post (docs/agents.md); or install slime beside this project."
)
# Setting of CustomConfig -> what its function is called with, and what an error shows.
POSITIONAL = {
    "generate": ("args", "sample", "sampling_params"),
    "sample_hooks": ("args", "sample"),
    "dynamic_filter": ("args", "samples"),
    "sample_filter": ("args", "groups"),
    "reward_post_process": ("args", "samples"),
    "rollout": ("args", "rollout_id", "data_source"),
    "buffer_filter": ("args", "rollout_id", "buffer", "num_samples"),
    "rollout_log": ("rollout_id", "args", "samples", "rollout_extra_metrics", "rollout_time"),
    "eval_log": ("rollout_id", "args", "data", "extra_metrics"),
}
# What a function may ask for besides, by the parameter's name.
BY_NAME = ("client", "evaluation", "rollout_id")


def check_own_functions(config: Config) -> None:
    """Raise ConfigError for every function that cannot be called; importing one runs the user's module."""
    raise_all(refused_by(*(partial(own_functions, config.custom, name) for name in POSITIONAL)))


def own_function(custom: CustomConfig, name: str) -> OwnFunction | None:
    """Return the function that a setting of ``custom`` names; None for none, and for what this project does itself."""
    return next(iter(own_functions(custom, name)), None)


def own_functions(custom: CustomConfig, name: str) -> tuple[OwnFunction, ...]:
    """Return the functions that a setting of ``custom`` names, without those that this project does itself."""
    named: str | tuple[str, ...] | None = getattr(custom, name)
    paths = () if named is None else (named,) if isinstance(named, str) else named
    functions = (_function(name, path) for path in paths)
    return tuple(each for each in functions if each is not None)


def _function(name: str, path: str) -> OwnFunction | None:
    if (name == "dynamic_filter" and path in FILTERS) or (name == "rollout" and path == SLIMES_DEFAULT):
        return None
    setting, arguments = f"custom.{name}", POSITIONAL[name]
    function = _loaded(setting, path)
    form = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise ConfigError(setting, f"must name a function {form}", path, "Check the attribute.")
    if name == "generate" and not _is_async(function):
        rule, remedy = f"must name an async function {form}", "Write `async def`, and await the client's turns."
        raise ConfigError(setting, rule, path, remedy)
    _check_arguments(function, setting, path, arguments)
    return function


def takes(function: OwnFunction, argument: str) -> bool:
    """Return whether a function has a parameter of this name, or takes any."""
    parameters = inspect.signature(function).parameters
    return argument in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _is_async(function: OwnFunction) -> bool:
    of_object = getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is async
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(of_object)


def _check_arguments(function: OwnFunction, setting: str, path: str, arguments: tuple[str, ...]) -> None:
    signature = inspect.signature(function)
    try:
        besides = [each for each in BY_NAME if each in signature.parameters and each not in arguments]
        signature.bind(*arguments, **dict.fromkeys(besides))
    except TypeError as error:
        rule = f"must name a function that is called with ({', '.join(arguments)}): {error}"
        raise ConfigError(setting, rule, f"{path}{signature}", "Write these arguments.") from None


def _loaded(setting: str, path: str) -> Any:
    """Import what ``module.function`` or ``module:function`` names."""
    module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module or not attribute:
        raise ConfigError(setting, "must be a function's name", path, "Write module.function or module:function.")
    try:
        return load_attribute(setting, f"{module}:{attribute}")
    except ConfigError as error:
        if ABSENT_SLIME.search(error.rule):
            raise ConfigError(setting, "needs slime, which is not installed here", path, WITHOUT_SLIME) from None
        raise
