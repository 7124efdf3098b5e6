"""A ServerTransport carries buckets of named tensors to a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rollout.sglang_engine.client import SglangClient
from slime_spec.weights.messages import NamedTensors


class ServerTransport(Protocol):
    """Carries the buckets of one push to one server."""

    async def open(self, client: SglangClient) -> None: ...

    async def send(self, client: SglangClient, bucket: NamedTensors, fields: Mapping[str, Any]) -> None:
        """Have the server load the bucket; ``fields`` go into its request. Raises ServerRefused or ServerGone."""

    async def close(self, client: SglangClient) -> None: ...
