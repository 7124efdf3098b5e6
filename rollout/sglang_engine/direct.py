"""A server takes a push straight from the trainer's ranks; its engine only tells the server what comes next.

pause (retract) ─ begin(side) ─ bucket ─ bucket ─ … ─ end     PreparePush: the server has it all, and waits
                                                    continue   CommitPush: it generates with it

The server loads in place and is paused meanwhile. A push that is given up in between leaves a part of it in the server,
which must be replaced: its successor gets the weights of the push before, which the ranks have kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

import torch

from rollout.sglang_engine.client import ServerGone, ServerRefused, SglangClient
from rollout.sglang_engine.contract import TENSOR
from rollout.sglang_engine.delivery import Delivery
from rollout.sglang_engine.kept_server import KeptServer
from slime_spec.errors import PushError
from slime_spec.transports.kept import PushedTensors
from slime_spec.transports.server_group import ServerGroupTransport, tell_lost
from slime_spec.transports.to_servers import ServerRoute, ToServers
from slime_spec.weights.messages import Manifest, PauseMode, PushBucket

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Fields = Mapping[str, Any]


class Way(Protocol):
    """Tells one server how a bucket comes."""

    uses_group: bool

    async def load(self, client: SglangClient, bucket: PushBucket, fields: Fields) -> None:
        """Have the server load a bucket; raises ServerRefused, ServerGone or PushError."""

    def forget(self, is_replaced: bool) -> None:
        """Note that the server is another, or may have missed what others have done."""


class ByGroup:
    """Has the server's ranks join the groups of the trainer's ranks, and receive what these broadcast."""

    uses_group = True

    def __init__(self, transport: ToServers, num_ranks: int) -> None:
        self._transport, self._num_ranks = transport, num_ranks
        self._joined: dict[str, ServerRoute] = {}
        self._spoilt: set[str] = set()  # groups that the server is yet to leave

    async def load(self, client: SglangClient, bucket: PushBucket, fields: Fields) -> None:
        (sent,) = bucket.handle
        if sent.group not in self._joined:
            await self._leave_old(client)
            await self._join(client, sent.group, sent.backend)
        request = {
            "names": [meta.name for meta in bucket.tensors],
            "dtypes": [meta.dtype for meta in bucket.tensors],
            "shapes": [list(meta.shape) for meta in bucket.tensors],
            "group_name": sent.group,
            **fields,
        }
        await client.post("/update_weights_from_distributed", request)

    def forget(self, is_replaced: bool) -> None:
        for route in self._joined.values():
            tell_lost(route)
        self._spoilt = set() if is_replaced else self._spoilt | self._joined.keys()
        self._joined = {}

    async def _join(self, client: SglangClient, group: str, backend: str) -> None:
        route = next(route for route in self._transport.routes if route.group == group)
        self._joined[group] = route  # from now on others may wait for it
        request = {
            "master_address": route.host,
            "master_port": route.port,
            "rank_offset": 1 + self._transport.place * self._num_ranks,
            "world_size": route.world_size,
            "group_name": group,
            "backend": backend,
        }
        await client.post("/init_weights_update_group", request)

    async def _leave_old(self, client: SglangClient) -> None:
        self._spoilt |= self._joined.keys() - {route.group for route in self._transport.routes}
        for group in sorted(self._spoilt):
            self._joined.pop(group, None)
            self._spoilt.discard(group)
            try:
                await client.post("/destroy_weights_update_group", {"group_name": group})
            except ServerRefused as error:  # it never became a member
                logger.warning("a group was not left: %s", error)


class ByHandles:
    """Gives each of the server's ranks the handles of the trainer's rank on its GPU."""

    uses_group = False

    def __init__(self, transport: ToServers, engine_index: int, num_ranks: int) -> None:
        self._transport, self._index, self._num_ranks = transport, engine_index, num_ranks

    async def load(self, client: SglangClient, bucket: PushBucket, fields: Fields) -> None:
        await client.post(TENSOR, {"serialized_named_tensors": self._own(bucket), **fields})

    def forget(self, is_replaced: bool) -> None:
        pass

    def _own(self, bucket: PushBucket) -> list[str]:
        handles = [text for of_rank in bucket.handle for text in of_rank.texts]
        # Every rank publishes on GPUs, for the servers beside it; on a CPU one does, for the servers that take part.
        place = self._index if torch.cuda.is_available() else self._transport.place
        own = handles[place * self._num_ranks : (place + 1) * self._num_ranks]
        if len(own) < self._num_ranks:
            raise PushError(f"bucket {bucket.index} has {len(handles)} handles, and none for every rank of this server")
        return own


class Direct:
    """Holds what pushes straight to one server have in common."""

    def __init__(self, transport: ToServers, engine_index: int, delivery: Delivery, server: KeptServer) -> None:
        num_ranks = server.info.num_ranks
        self.transport, self.delivery, self.server = transport, delivery, server
        self.way: Way = (
            ByGroup(transport, num_ranks)
            if isinstance(transport, ServerGroupTransport)
            else ByHandles(transport, engine_index, num_ranks)
        )


class DirectStaging:
    """Implements Staging and Forwards: the server itself is what a push is staged in.

    ``mtp_names`` are the target's tensors that belong to the draft inside the target; ``paused`` says how the push has
    paused the server; ``replace`` replaces a server that has a part of a push.
    """

    def __init__(
        self,
        manifest: Manifest,
        expected: Shapes,
        direct: Direct,
        mtp_names: frozenset[str],
        paused: PauseMode | None,
        replace: Callable[[str], None],
    ) -> None:
        self.expected = expected
        self._manifest, self._direct, self._paused, self._replace = manifest, direct, paused, replace
        self._pending = {meta.name for meta in manifest.tensors}
        has_both = manifest.side == "target" and bool(mtp_names & self._pending)
        self._fields = direct.delivery.fields_of(manifest.side, direct.way.uses_group, has_both)
        self._num_replaced = direct.server.num_replaced
        self._is_begun = self._is_over = False

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the push's tensors, which the trainer's ranks keep."""
        names = [meta.name for meta in self._manifest.tensors]
        return PushedTensors(names, [(route.push, route.source) for route in self._direct.transport.routes])

    def add(self, name: str, tensor: torch.Tensor) -> None:
        raise AssertionError("the server has the tensors, and the engine does not")

    def keep(self) -> None:
        pass

    def forward(self, bucket: PushBucket) -> None:
        self._call(self._load(bucket))

    def build(self) -> None:
        self._call(self._direct.delivery.end_session())

    def take_over(self) -> None:
        """Have the server generate with the push; raises ServerGone or ServerRefused."""
        self._is_over = True
        if self._is_another_server:
            raise ServerGone("it was replaced within the push")
        if self._paused is None:
            self._direct.server.loop.call(self._direct.server.client.post("/continue_generation"))

    def drop(self, why: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._direct.way.forget(is_replaced=False)
        if self._is_begun and not self._is_another_server:
            self._replace(f"it has a part of the push of {self._manifest.side} version {self._manifest.version}: {why}")

    @property
    def _is_another_server(self) -> bool:
        return self._direct.server.num_replaced != self._num_replaced

    def _call(self, call: Coroutine[Any, Any, None]) -> None:
        try:
            if self._is_another_server:
                call.close()
                raise ServerGone("it was replaced within the push")
            self._direct.server.loop.call(call)
        except (ServerGone, ServerRefused) as error:
            raise PushError(f"the server did not take the push: {error}") from error

    async def _load(self, bucket: PushBucket) -> None:
        client, delivery = self._direct.server.client, self._direct.delivery
        if not self._is_begun:
            self._is_begun = True
            if self._paused is None:
                await client.post("/pause_generation", {"mode": "retract"})
            await delivery.begin_session(self._fields)
        self._pending -= {meta.name for meta in bucket.tensors}
        is_last = not self._pending
        # KV that paused requests hold cannot be flushed, and the server dies of trying
        fields = {**self._fields, "flush_cache": is_last and self._paused != "in_place"}
        if is_last and self._manifest.side == "target":
            fields["weight_version"] = delivery.label(self._manifest.version)
        await self._direct.way.load(client, bucket, fields)
