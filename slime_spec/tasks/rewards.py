"""This module has the named rewards and loads a user's own: each takes the prompt and the reply's text."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from slime_spec.errors import ConfigError
from slime_spec.interfaces import load
from slime_spec.suggest import did_you_mean
from slime_spec.types import Prompt

Reward = Callable[[Prompt, str], float]

REWARDS = {
    "last_integer": "slime_spec.tasks.rewards:last_integer",
    "exact": "slime_spec.tasks.rewards:exact",
    "contains": "slime_spec.tasks.rewards:contains",
}
# A thousands separator or a fraction belongs to its number; a hyphen after a digit is a minus or a range, not a sign.
NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:,\d{3})*(?!\d)(?:\.\d+)?")


def last_integer(prompt: Prompt, reply: str) -> float:
    """Return 1 if the last number of the reply equals the answer, an integer, else 0: "2 + 3 = 5." answers 5."""
    found = NUMBER.findall(reply)
    return float(bool(found) and Decimal(found[-1].replace(",", "")) == int(prompt.answer))


def exact(prompt: Prompt, reply: str) -> float:
    """Return 1 if the reply is the answer, white space around it ignored, else 0."""
    return float(reply.strip() == prompt.answer.strip())


def contains(prompt: Prompt, reply: str) -> float:
    """Return 1 if the answer occurs in the reply, else 0."""
    return float(prompt.answer in reply)


def load_reward(setting: str, name: str) -> Reward:
    """Return a built-in reward, or the function that ``module:function`` names; slime writes ``module.function``.

    Raises ConfigError for an unknown one.
    """
    if name in REWARDS:
        reward: Reward = load(REWARDS[name])
        return reward
    if ":" not in name:
        module, _, function = name.rpartition(".")
        if not module:
            hint = did_you_mean(name, REWARDS, repr)
            rule = f"must be one of {', '.join(sorted(REWARDS))}, or a function of your own as module:function"
            raise ConfigError(setting, rule, name, f"{hint}Choose a known name, or write module:function.")
        name = f"{module}:{function}"
    loaded = load_attribute(setting, name)
    if not callable(loaded):
        raise ConfigError(setting, "must name a function reward(prompt, reply) -> float", name, "Check the attribute.")
    own: Reward = loaded
    return own


def load_attribute(setting: str, name: str) -> Any:
    """Return what ``module:attribute`` names, or a ConfigError that says which half was not found."""
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's module may raise anything
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        remedy = "Set PYTHONPATH to the module's folder." if not kind else "Mend the module."
        rule = f"must name an importable module:function: {kind}{error}"
        raise ConfigError(setting, rule, name, remedy) from None
    if not hasattr(loaded, attribute):
        raise ConfigError(setting, f"{module} has no attribute {attribute}", name, "Check the attribute's spelling.")
    return getattr(loaded, attribute)
