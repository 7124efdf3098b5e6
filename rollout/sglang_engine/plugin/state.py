"""The state is what the plug-in does in this process; a log line and the server's /server_info show it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.sglang_engine.plugin.hooks import Process
from slime_spec import __version__

# Turns parts of the plug-in off: "all", or names of features with commas between them.
OFF = "SLIME_SPEC_PLUGIN_OFF"
ALL = "all"
KEY = "slime_spec_plugin"  # in /server_info
logger = logging.getLogger("slime_spec.plugin")


@dataclass(frozen=True)
class Detail:
    """How a feature shows what it does, in the process where it does it."""

    process: Process
    show: Callable[[], Any]


@dataclass
class State:
    """The plug-in in one process; a feature adds its detail by its name."""

    process: str = ""
    sglang: str = ""
    active: dict[str, str] = field(default_factory=dict)  # feature to the releases of its contract
    inactive: dict[str, str] = field(default_factory=dict)  # feature to the reason
    details: dict[str, Detail] = field(default_factory=dict)

    def leave_out(self, feature: str, reason: str) -> None:
        """Says in a line, once, that a feature does nothing in this process, and why."""
        if feature in self.inactive:
            return
        self.active.pop(feature, None)
        self.inactive[feature] = reason
        logger.error(
            "slime_spec plug-in: %s is NOT active: SGLang %s is none of the releases that it knows: %s",
            feature,
            self.sglang,
            reason,
        )

    def shown(self, process: Process) -> dict[str, Any]:
        """Return what is shown of a process; a scheduler that was forked has the state of the main process."""
        details = {
            feature: detail.show()
            for feature, detail in self.details.items()
            if feature in self.active and detail.process == process
        }
        return {
            "version": __version__,
            "process": process,
            "active": sorted(self.active),
            "inactive": dict(self.inactive),
            **details,
        }


STATE = State()


def turned_off(environment: Mapping[str, str] = os.environ) -> set[str]:
    return {name for part in environment.get(OFF, "").split(",") if (name := part.strip())}
