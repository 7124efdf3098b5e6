"""ServerGroupTransport broadcasts each bucket from a trainer's rank to the ranks of all servers: nccl, or gloo on CPUs.

    rank 0 of a group: a trainer's rank ──┬──► 1 …: the ranks of engine 0's server
                                          └──► …:   the ranks of engine 1's server …

A group outlives a push, as long as the same servers take part. They join it by what their engines ask of them (see
rollout.sglang_engine.direct), at the first bucket that comes by it. An engine whose server is not a member any more
says so in the store where the group has met, and a group that a broadcast has failed in is not used again: the next
push has a new group.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

from slime_spec.transports.store import form_group, store_on
from slime_spec.transports.to_servers import ServerRoute, ToServers
from slime_spec.weights.messages import NamedTensors, Opening

# A server that is gone holds the others up for so long: when they meet, and in a broadcast.
MEET_TIMEOUT, SEND_TIMEOUT = timedelta(seconds=60), timedelta(seconds=60)
TELL_TIMEOUT = timedelta(seconds=5)
SETTLE_S = 5.0  # from the servers' last answer to the end of the broadcast here
NUM_AHEAD = 2  # buckets that a rank has sent and no server may have taken yet
LOST = "a member is lost"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """Says by which group a bucket comes."""

    group: str
    backend: str


class ServerGroupTransport(ToServers):
    """Implements WeightTransport as the module says; each server has ``ranks_per_server`` members in a group."""

    def __init__(self, ranks_per_server: int) -> None:
        super().__init__(ranks_per_server)
        self._sender: Sender | None = None
        self._receivers: tuple[int, ...] = ()  # whose servers are the group's

    def open(self, host: str, opening: Opening) -> ServerRoute:
        is_theirs = opening.receivers == self._receivers and not opening.is_new
        if self._sender is None or self._sender.is_spoilt or not is_theirs:
            self._leave()
            self._sender = Sender(host, 1 + len(opening.receivers) * self.ranks_per_server)
            self._receivers = opening.receivers
        return self._sender.route(self, opening)

    def _send(self, named: NamedTensors) -> Sent:
        assert self._sender is not None, "opened before it publishes"
        return self._sender.send([tensor.detach() for _, tensor in named])

    def close(self) -> None:
        if self._sender is not None and not self._sender.has_settled():
            self._leave()

    def _leave(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None


class Sender:
    """Broadcasts buckets one after the other from a thread of its own, as rank 0 of a group."""

    def __init__(self, host: str, world_size: int) -> None:
        self._host, self._world_size, self._name = host, world_size, uuid4().hex
        self._store = store_on(host, world_size, MEET_TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._sending: deque[Future[None]] = deque()
        self._group: dist.ProcessGroup | None = None
        self._failed = False

    def route(self, transport: ToServers, opening: Opening) -> ServerRoute:
        push = transport.kept.begin(opening)
        return ServerRoute(push, transport.kept, self._name, self._host, self._store.port, self._world_size)

    @property
    def is_spoilt(self) -> bool:
        """Return whether an engine has said that its server is not a member any more."""
        return self._store.check([LOST])

    def send(self, tensors: Sequence[torch.Tensor]) -> Sent:
        """Queue the tensors; raises what the broadcast of an earlier bucket has raised."""
        while len(self._sending) >= NUM_AHEAD:
            self._sending.popleft().result()
        backend = "nccl" if tensors[0].device.type == "cuda" else "gloo"
        self._sending.append(self._thread.submit(self._send, tensors, backend))
        return Sent(self._name, backend)

    def has_settled(self) -> bool:
        """Return whether all that was sent has been received."""
        _, pending = wait(self._sending, SETTLE_S)
        self._sending.clear()
        return not (pending or self._failed)

    def close(self) -> None:
        """Leave the group once the broadcast in progress has ended, without waiting for it."""
        for sending in self._sending:
            sending.cancel()
        self._thread.submit(self._leave)
        self._thread.shutdown(wait=False)

    def _send(self, tensors: Sequence[torch.Tensor], backend: str) -> None:
        if backend == "nccl":
            torch.cuda.set_device(tensors[0].device)  # of this thread
        assert not self._failed, "a failed broadcast is the last"
        self._failed = True  # until all of it is there
        if self._group is None:
            self._group = form_group(self._store, 0, self._world_size, self._name, backend, MEET_TIMEOUT)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, SEND_TIMEOUT
        try:
            for tensor in tensors:
                self._group.broadcast([tensor.contiguous()], options).wait()
            if backend == "nccl":
                torch.cuda.current_stream().synchronize()
            self._failed = False
        except RuntimeError:
            self._leave()
            raise

    def _leave(self) -> None:
        """Drop the group, and with it the connections: the servers that wait for this rank hear of it at once."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)


def tell_lost(route: ServerRoute) -> None:
    """Have the rank of a group make another group for its next push."""
    try:
        store = dist.TCPStore(route.host, route.port, timeout=TELL_TIMEOUT, wait_for_workers=False)
        store.set(LOST, "")
    except (RuntimeError, ValueError) as error:  # a rank that is gone, or has left the group, makes another anyway
        logger.warning("the trainer's rank is not told of a lost member: %s", error)
