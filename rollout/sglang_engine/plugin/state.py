"""The state is what the plug-in does in this process; a log line and the server's /server_info show it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slime_spec import __version__

# Turns parts of the plug-in off: "all", or names of features with commas between them.
OFF = "SLIME_SPEC_PLUGIN_OFF"
ALL = "all"
KEY = "slime_spec_plugin"  # in /server_info
logger = logging.getLogger("slime_spec.plugin")


@dataclass
class State:
    """The plug-in in one process; a feature adds by its name how it shows what it does."""

    process: str = ""
    sglang: str = ""
    active: dict[str, str] = field(default_factory=dict)  # feature to the releases of its contract
    inactive: dict[str, str] = field(default_factory=dict)  # feature to the reason
    details: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "process": self.process,
            "active": sorted(self.active),
            "inactive": dict(self.inactive),
        }

    def shown_in_detail(self) -> dict[str, Any]:
        """What the features of a scheduler count, too."""
        return self.shown() | {feature: show() for feature, show in self.details.items() if feature in self.active}


STATE = State()


def turned_off(environment: Mapping[str, str] = os.environ) -> set[str]:
    return {name for part in environment.get(OFF, "").split(",") if (name := part.strip())}
