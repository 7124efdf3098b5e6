"""CollectiveTransport broadcasts each bucket from a trainer's rank to all engines at once: nccl on GPUs, gloo on CPUs.

    rank 0 of a group: a trainer's rank ──┬──► 1: engine 0
                                          └──► 2: engine 1 …

Each rank that publishes has a group of its own with the engines, for one push: it opens a store, BeginPush tells the
engines where, and all of them meet there for the first bucket, when every engine has agreed to the push. The rank sends
from a thread: a broadcast ends when the engines take it, and they do when they have the bucket's message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast
from uuid import uuid4

import torch
import torch.distributed as dist

from slime_spec.errors import PushError
from slime_spec.transports.packed import layout, pack, unpacked
from slime_spec.transports.store import store_on
from slime_spec.weights.messages import NamedTensors, Opening, PushBucket

# An engine that is gone holds the others up for so long: when they meet, and in a broadcast.
MEET_TIMEOUT, SEND_TIMEOUT = timedelta(seconds=30), timedelta(seconds=60)
NUM_AHEAD = 2  # buckets that a rank has sent and no engine may have taken yet


@dataclass(frozen=True)
class Route:
    """Says where the members of a rank's group meet."""

    name: str
    host: str
    port: int
    world_size: int


@dataclass(frozen=True)
class Sent:
    """Says by which group a bucket comes, to what kind of device, and where its tensors begin in it."""

    route: str
    device: str
    starts: tuple[int, ...]
    num_bytes: int


class Group(Protocol):
    """Does what torch's process groups do; their types do not say it."""

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions, /) -> dist.Work: ...


class Member:
    """Takes part in a group, which is this object's alone, beside whatever groups the process has.

    A broadcast that fails ends the membership, so that the others, who wait for this member, hear of it at once.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, device: str) -> None:
        """Meet the other members; raises RuntimeError where they do not come."""
        self._group: Group | None = _group(store, rank, world_size, device)

    def broadcast(self, memory: torch.Tensor) -> None:
        """Send the memory as rank 0, or receive into it; raises RuntimeError."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, SEND_TIMEOUT
        assert self._group is not None, "a member"
        try:
            self._group.broadcast([memory], options).wait()
        except RuntimeError:
            self.leave()
            raise

    def leave(self) -> None:
        """Drop the group, and with it the connections: nothing else may refer to it, a traceback's frame neither."""
        self._group = None


class CollectiveTransport:
    """Implements WeightTransport as the module says."""

    lends = False

    def __init__(self) -> None:
        self._sender: Sender | None = None
        self._rank = 0
        self._routes: dict[str, Route] = {}
        self._members: dict[str, Member] = {}

    def open(self, host: str, opening: Opening) -> Route:
        self._sender = Sender(host, 1 + len(opening.receivers))
        return self._sender.route

    def publish(self, named: NamedTensors) -> tuple[Sent, ...]:
        assert self._sender is not None, "opened before it publishes"
        return (self._sender.send([tensor for _, tensor in named]),)

    def join(self, routes: Sequence[Route], place: int) -> None:
        self._rank = 1 + place
        self._routes = {route.name: route for route in routes}

    def receive(self, bucket: PushBucket) -> list[torch.Tensor]:
        (sent,) = bucket.handle
        memory = torch.empty(sent.num_bytes, dtype=torch.uint8, device=sent.device)
        try:
            if sent.route not in self._members:
                self._members[sent.route] = self._joined(self._routes[sent.route], sent.device)
            self._members[sent.route].broadcast(memory)
        except RuntimeError as error:
            raise PushError(f"bucket {bucket.index} did not come: {error}") from error
        return unpacked(memory, sent.starts, bucket.tensors)

    def release(self) -> None:
        pass  # what was received is the engine's own

    def close(self) -> None:
        for member in self._members.values():
            member.leave()
        self._members, self._routes = {}, {}
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _joined(self, route: Route, device: str) -> Member:
        store = dist.TCPStore(route.host, route.port, route.world_size, False, MEET_TIMEOUT)
        return Member(store, self._rank, route.world_size, device)


class Sender:
    """Broadcasts buckets one after the other from a thread of its own, as rank 0 of a group."""

    def __init__(self, host: str, world_size: int) -> None:
        self._store = store_on(host, world_size, MEET_TIMEOUT)
        self.route = Route(uuid4().hex, host, self._store.port, world_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._sending: deque[Future[None]] = deque()
        self._member: Member | None = None

    def send(self, tensors: Sequence[torch.Tensor]) -> Sent:
        """Queue a copy of the tensors; raises what the broadcast of an earlier bucket has raised."""
        while len(self._sending) >= NUM_AHEAD:
            self._sending.popleft().result()
        starts, num_bytes = layout(tensors)
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=tensors[0].device)
        pack(tensors, starts, memory)
        self._sending.append(self._thread.submit(self._send, memory))
        return Sent(self.route.name, memory.device.type, starts, num_bytes)

    def close(self) -> None:
        """Leave the group once the broadcast in progress has ended, without waiting for it."""
        for sending in self._sending:
            sending.cancel()
        self._thread.submit(self._leave)
        self._thread.shutdown(wait=False)

    def _send(self, memory: torch.Tensor) -> None:
        if self._member is None:
            self._member = Member(self._store, 0, self.route.world_size, memory.device.type)
        self._member.broadcast(memory)

    def _leave(self) -> None:
        if self._member is not None:
            self._member.leave()


def _group(store: dist.Store, rank: int, world_size: int, device: str) -> Group:
    if device != "cuda":
        return cast(Group, dist.ProcessGroupGloo(store, rank, world_size, MEET_TIMEOUT))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = SEND_TIMEOUT
    return cast(Group, dist.ProcessGroupNCCL(store, rank, world_size, options))
