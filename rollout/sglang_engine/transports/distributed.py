"""DistributedTransport forms a process group of engine (rank 0) and server for one push: gloo, or nccl for GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rollout.sglang_engine.client import ServerGone, SglangClient
from slime_spec.transports.store import form_group, store_on
from slime_spec.weights.messages import NamedTensors

FORM_TIMEOUT = timedelta(minutes=2)
SEND_TIMEOUT = timedelta(minutes=10)


class DistributedTransport:
    """Broadcasts buckets to a server; ``host`` is an address of this machine that the server reaches."""

    def __init__(self, host: str, num_ranks: int, on_gpu: bool, name: str) -> None:
        self._host, self._num_ranks, self._name = host, num_ranks, name
        self._backend, self._device = ("nccl", "cuda") if on_gpu else ("gloo", "cpu")
        self._number = 0
        self._group: dist.ProcessGroup | None = None
        self._sending: asyncio.Task[None] | None = None

    async def open(self, client: SglangClient) -> None:
        """Form the group; both ends wait for each other."""
        self._number += 1
        world_size = 1 + self._num_ranks
        store = store_on(self._host, world_size, FORM_TIMEOUT)
        group_name = f"{self._name}-{self._number}"
        request = {
            "master_address": self._host,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": world_size,
            "group_name": group_name,
            "backend": self._backend,
        }
        joined = asyncio.create_task(client.post("/init_weights_update_group", request))
        formed = asyncio.create_task(
            asyncio.to_thread(form_group, store, 0, world_size, group_name, self._backend, FORM_TIMEOUT)
        )
        # The end that fails first has the error to raise: the other end waits in vain, and gives up by itself.
        await asyncio.wait({joined, formed}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (joined, formed):
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            if task.done():
                task.result()
        self._group = formed.result()

    async def send(self, client: SglangClient, bucket: NamedTensors, fields: Mapping[str, Any]) -> None:
        request = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": f"{self._name}-{self._number}",
            **fields,
        }
        loaded = asyncio.create_task(client.post("/update_weights_from_distributed", request))
        self._sending = asyncio.create_task(asyncio.to_thread(self._broadcast, bucket))
        # A server that refuses never joins the broadcasts, which then end when it leaves the group (see close).
        await asyncio.wait({loaded, self._sending}, return_when=asyncio.FIRST_EXCEPTION)
        await loaded
        await self._sending

    async def close(self, client: SglangClient) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        try:
            await client.post("/destroy_weights_update_group", {"group_name": f"{self._name}-{self._number}"})
        finally:
            if self._sending is not None:
                await asyncio.wait({self._sending})
                self._sending.exception()  # raised by send, or caused by what the server answered
            dist.destroy_process_group(group)

    def _broadcast(self, bucket: NamedTensors) -> None:
        assert self._group is not None, "opened before it sends"
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, SEND_TIMEOUT
        try:
            for _, tensor in bucket:
                # gloo only reads a tensor that it sends, so that Ray's read-only memory will do.
                self._group.broadcast([tensor.contiguous().to(self._device)], options).wait()
        except RuntimeError as error:
            raise ServerGone(f"the broadcast to {self._name}: {error}") from error
