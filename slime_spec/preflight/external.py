"""Servers that someone else started, asked for the flags they run with: the settings here say nothing about them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_spec.config.build import from_dict, to_dict
from slime_spec.config.tree import DTYPES, Config
from slime_spec.sglang.flags import sglang_flags

PATHS = ("/server_info", "/get_server_info")  # from 0.5.10 on, and before
ASK_TIMEOUT_S = 5.0
OF_ENGINE = ("context_length", "max_running_requests", "max_total_tokens")
OF_SPECULATION = (
    *("num_steps", "eagle_topk", "num_draft_tokens", "accept_threshold_single", "accept_threshold_acc"),
    *("use_rejection_sampling", "use_block_verification"),
)


@dataclass(frozen=True)
class ExternalServer:
    """``ExternalServer("10.0.0.1:30000", "0.5.21", {"attention_backend": "fa3", ...})``"""

    address: str
    version: str
    flags: Mapping[str, object]


def ask_server(address: str, api_key: object) -> ExternalServer | None:
    """None where nothing that is SGLang answers within seconds."""
    for path in PATHS:
        request = urllib.request.Request(f"http://{address}{path}")
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        try:
            with urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as response:
                answer: Any = json.loads(response.read())
        except urllib.error.HTTPError:
            continue
        except (OSError, ValueError):
            return None
        if isinstance(answer, dict) and "version" in answer:
            known = sglang_flags()
            flags = {dest: value for dest, value in answer.items() if dest in known and value is not None}
            return ExternalServer(address, str(answer["version"]), flags)
    return None


def config_as_served(config: Config, server: ExternalServer) -> Config:
    """The settings with those of the server in their places; its folders and names stay as they are said here."""
    data: dict[str, Any] = to_dict(config)
    flags = server.flags
    data["engine"] |= {name: flags[name] for name in OF_ENGINE if name in flags}
    if flags.get("dtype") in DTYPES:
        data["engine"]["dtype"] = flags["dtype"]
    told = {name: flags.get(f"speculative_{name}") for name in OF_SPECULATION}
    data["speculative"] |= {name: value for name, value in told.items() if value is not None}
    return from_dict(data)
