"""Speculation control says who can keep a running server from speculating: a request, the server itself, or nobody.

No release of SGLang that was read lets a request opt out, and its /set_internal_state has no switch for speculation.
What others spell is tried: a request with the field must come back without a verify round, because a field may be known
and do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slime_spec.sglang.releases import was_read
from slime_spec.sglang.server_info import ServerInfo

Level = Literal["requests", "batches", "nothing"]


@dataclass(frozen=True)
class RequestSwitch:
    """Names the field of a request, inside its object ``parent``, that asks for decoding without speculation.

    Example: ``RequestSwitch("sampling_params", "disable_speculative_decoding")``
    """

    parent: str
    field: str

    def put(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body of a request that does not speculate."""
        return {**body, self.parent: {**body.get(self.parent, {}), self.field: True}}


# RTP-LLM's, which the server of this project has too; and what SGLang's RFC 30263 proposes.
EXTRA_CONFIG = RequestSwitch("extra_config", "force_disable_sp_run")
SAMPLING_PARAMS = RequestSwitch("sampling_params", "disable_speculative_decoding")


def switches_to_try(version: str) -> tuple[RequestSwitch, ...]:
    """Return the spellings to try on a server of this version.

    Servers ignore objects that they do not know. A field of sampling_params that SGLang does not know is an internal
    error with a traceback in its log, and harms nothing else: releases that were read are not asked for it.
    """
    return (EXTRA_CONFIG,) if was_read(version) else (EXTRA_CONFIG, SAMPLING_PARAMS)


@dataclass(frozen=True)
class SpeculationControl:
    """Holds what a server allows: ``switch`` where requests can opt out, ``by_batch`` where its own table decides.

    Example: ``SpeculationControl(None, by_batch=True)`` is a server with --speculative-adaptive.
    """

    switch: RequestSwitch | None
    by_batch: bool

    @property
    def level(self) -> Level:
        if self.switch is not None:
            return "requests"
        return "batches" if self.by_batch else "nothing"

    @property
    def told(self) -> str:
        """Return the level as a line of a log."""
        return {
            "requests": "requests can opt out: the engine decides between rollouts by measured costs",
            "batches": "it drafts by its own table of batches (--speculative-adaptive) until it is restarted",
            "nothing": "it drafts for every request until it is restarted, whether that pays or not",
        }[self.level]


def decides_by_batch(info: ServerInfo) -> bool:
    """Return whether the server reports that it changes the depth of drafts, to none at its table's large batches."""
    return bool(info.flags.get("speculative_adaptive"))
