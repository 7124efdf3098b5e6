"""A trainer's rank sends straight to servers: the engine that keeps a server only tells the server what comes.

    rank ════ tensors ════► server        nccl or gloo group (server_group), or handles of shared memory (server_ipc)
      └── PushBucket ──► engine ── HTTP ──┘

So nobody but the rank sees the tensors: it checks their values, takes their checksums and keeps a copy (kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slime_spec.transports.kept import KeptWeights, Source
from slime_spec.weights.messages import NamedTensors, PushBucket
from slime_spec.weights.receive import check_values


@dataclass(frozen=True)
class ServerRoute:
    """Says where a rank's group meets, if it has a group, and who keeps what the rank sends as ``push``."""

    push: str
    source: Source
    group: str = ""
    host: str = ""
    port: int = 0
    world_size: int = 0


class ToServers:
    """Implements of WeightTransport what every transport to servers has in common; ``routes`` are for the engine."""

    lends = False

    def __init__(self, ranks_per_server: int) -> None:
        self.ranks_per_server = ranks_per_server
        self.kept = KeptWeights()
        self.routes: tuple[ServerRoute, ...] = ()
        self.place = 0  # of the engine among those that take part in the push

    def publish(self, named: NamedTensors) -> tuple[Any, ...]:
        dtypes = {tensor.dtype for _, tensor in named}
        for dtype in dtypes:
            alike = [(name, tensor) for name, tensor in named if tensor.dtype == dtype]
            check_values([name for name, _ in alike], [tensor for _, tensor in alike], dtype)
        self.kept.add(named)
        return (self._send(named),)

    def join(self, routes: Sequence[ServerRoute], place: int) -> None:
        self.routes, self.place = tuple(routes), place

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        raise AssertionError("the server has the tensors, and the engine does not")

    def release(self) -> None:
        pass

    def _send(self, named: NamedTensors) -> Any:
        raise NotImplementedError
