"""What the plug-in does in this process: shown in one log line, and in the server's /server_info."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
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
    """The plug-in in one process; features add what they count to ``counts``."""

    process: str = ""
    sglang: str = ""
    active: dict[str, str] = field(default_factory=dict)  # feature to the releases of its contract
    inactive: dict[str, str] = field(default_factory=dict)  # feature to the reason
    counts: dict[str, Any] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "process": self.process,
            "active": sorted(self.active),
            "inactive": dict(self.inactive),
            **self.counts,
        }


STATE = State()


def turned_off(environment: Mapping[str, str] = os.environ) -> set[str]:
    return {name for part in environment.get(OFF, "").split(",") if (name := part.strip())}
