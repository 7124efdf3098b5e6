"""A running server reports its version, sizes and flags, to its engine or to the checks of an external server."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slime_spec.config.api_key import SECRETS
from slime_spec.sglang.flags import sglang_flags

PATHS = ("/server_info", "/get_server_info")  # from 0.5.10 on, and before
ASK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ServerInfo:
    """Holds a running server's report about itself.

    ``num_ranks`` are the tensor-parallel ranks that weights are sent to; ``num_steps`` is a draft's depth;
    ``flags`` are the flags of the table that the server reports, by their dests; None where it has no value.

    Example: ``ServerInfo("0.5.21", max_total_tokens=4096, num_ranks=1, num_steps=3)``
    """

    version: str
    max_total_tokens: int
    num_ranks: int
    num_steps: int
    flags: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> ServerInfo:
        """Read the answer of /server_info; what has another type there than SGLang's flag has counts as absent."""

        def number(name: str) -> int:
            value = answer.get(name)
            return value if type(value) is int else 0

        return cls(
            version=str(answer.get("version", "?")),
            max_total_tokens=number("max_total_num_tokens"),
            num_ranks=(number("tp_size") or 1) * (1 if answer.get("enable_dp_attention") else number("dp_size") or 1),
            num_steps=number("speculative_num_steps") or (number("speculative_num_draft_tokens") or 1) - 1,
            flags={
                dest: answer[dest]
                for dest, flag in sglang_flags().items()
                if dest not in SECRETS and dest in answer and flag.has_type_of(answer[dest])
            },
        )


def ask_server(address: str, api_key: str | None) -> ServerInfo | None:
    """Return the answer of the server at ``address``; None where no SGLang server answers within seconds."""
    for path in PATHS:
        request = urllib.request.Request(f"http://{address}{path}")
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        try:
            with urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as response:
                answer: Any = json.loads(response.read())
        except urllib.error.HTTPError:
            continue
        except (OSError, ValueError, RecursionError, http.client.HTTPException):  # no HTTP, or no JSON
            return None
        if isinstance(answer, dict) and "version" in answer:
            return ServerInfo.of(answer)
    return None


@dataclass(frozen=True)
class Load:
    """Holds the load of a server: requests and KV tokens at one moment, over all data-parallel ranks."""

    num_running: int
    num_waiting: int
    num_used_tokens: int


def load_of(answer: object) -> Load:
    """Return the load that /v1/loads answers; zeros where the server lacks that path, or counts nothing there."""
    loads = answer.get("loads") if isinstance(answer, Mapping) else None
    ranks = [rank for rank in loads if isinstance(rank, Mapping)] if isinstance(loads, list) else []

    def total(name: str) -> int:
        return sum(value for rank in ranks if type(value := rank.get(name)) is int)

    return Load(total("num_running_reqs"), total("num_waiting_reqs"), total("num_used_tokens"))
