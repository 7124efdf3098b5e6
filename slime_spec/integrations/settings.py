"""The settings of a plug-in are one block, ``slime_spec``, of the YAML file that slime's --custom-config-path names.

    slime_spec:
      canary_prompts: 4
      break_even_length: 1.6

Where a launch has no such file, the variable SLIME_SPEC_PLUGIN names a YAML file with the same block.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slime_spec.config.draft_training import DraftTrainingConfig
from slime_spec.config.schema import Setting, settings_of
from slime_spec.config.setting import SAMPLES, setting
from slime_spec.config.sglang_server import SglangServerConfig
from slime_spec.config.yaml_file import read_yaml_file
from slime_spec.errors import ConfigError, raise_all
from slime_spec.suggest import did_you_mean

BLOCK = "slime_spec"
VARIABLE = "SLIME_SPEC_PLUGIN"
LONGEST_BREAK_EVEN = 1_000.0
_SERVERS, _DRAFTS = SglangServerConfig(), DraftTrainingConfig()
REMEDY = f"Write a YAML file with a block {BLOCK}: (docs/plug-in-frameworks.md)."


@dataclass(frozen=True)
class PluginSettings:
    """Holds the settings of a plug-in in another framework"""

    generate: str | None = setting(
        None, "Function of the user's own that generates a sample; default: the framework's own generate."
    )
    servers: tuple[str, ...] = setting(
        (), "Servers (host:port) behind the framework's router; default: those that the router lists."
    )
    canary_prompts: int = setting(
        _SERVERS.canary_prompts,
        "Prompts that every server generates greedily as a rollout begins, to see that drafts are accepted; 0: none.",
        minimum=0,
        maximum=SAMPLES,
    )
    canary_tokens: int = setting(_SERVERS.canary_tokens, "Tokens of a canary's response.", minimum=1, maximum=SAMPLES)
    canary_drop: float = setting(
        _SERVERS.canary_drop,
        "Accepted drafts per round below this share of their running mean: the draft is lost.",
        above=0.0,
        maximum=1.0,
    )
    feed_replies: bool = setting(True, "Give n-gram servers the earlier replies to a prompt as an external corpus.")
    break_even_length: float | None = setting(
        None,
        "Accept length from which on drafting is faster than not drafting at these servers, as slime-spec tune "
        "measures it, for the net speed-up where servers measure none.",
        above=0.0,
        maximum=LONGEST_BREAK_EVEN,
    )
    reward: str | None = setting(
        None,
        "Reward of this project's that scores samples as they are generated (math_verify, ...), or module:function; "
        "default: the framework's own.",
    )
    learned_draft: str | None = setting(
        None, "Folder in which before_train_step writes the draft that it trains, once a rollout; default: none learns."
    )
    draft_lr: float = setting(
        _DRAFTS.lr, "Learning rate of the draft that before_train_step trains.", minimum=0.0, maximum=1.0
    )
    engine: tuple[str, ...] = setting(
        (), "Flags of slime-spec serve for the engine of generate_embedded; its checkpoint is --hf-checkpoint's."
    )


@cache
def known() -> Mapping[str, Setting]:
    """Return the block's settings by their paths."""
    return settings_of(BLOCK, PluginSettings)


def plugin_settings(args: Any) -> PluginSettings:
    """Return the settings that a framework's ``args`` carry, or the file of VARIABLE; raises ConfigError."""
    block = getattr(args, BLOCK, None)
    if block is None and (named := os.environ.get(VARIABLE)):
        block = read_yaml_file(Path(named), REMEDY).get(BLOCK)
    return read_block({} if block is None else block)


def read_block(block: object) -> PluginSettings:
    """Return the settings of a block; raises ConfigError for all its mistakes at once."""
    if not isinstance(block, Mapping):
        raise ConfigError(BLOCK, "must be a group of settings", block, REMEDY)
    made: dict[str, Any] = {}
    errors: list[ConfigError] = []
    for name, value in block.items():
        path = f"{BLOCK}.{name}"
        if path not in known():
            rule, hint = "is not a setting of the plug-in", did_you_mean(path, known())
            errors.append(ConfigError(path, rule, value, hint + REMEDY))
            continue
        try:
            made[name] = known()[path].check(value)
        except ConfigError as error:
            errors.append(ConfigError(path, error.rule, error.value, REMEDY))
    raise_all(errors)
    return PluginSettings(**made)
