"""A process group of this engine (rank 0) and its server's ranks, made for one push: gloo, or nccl between GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world

from rollout.sglang_engine.client import SglangClient
from rollout.sglang_engine.server import free_port
from rollout.sglang_engine.transports.bucket import NamedTensors

TIMEOUT = timedelta(minutes=10)


class DistributedTransport:
    """``host`` is an address of this machine that the server reaches."""

    def __init__(self, host: str, num_ranks: int, on_gpu: bool, name: str) -> None:
        self._host, self._num_ranks, self._name = host, num_ranks, name
        self._backend, self._device = ("nccl", "cuda") if on_gpu else ("gloo", "cpu")
        self._number = 0
        self._group: dist.ProcessGroup | None = None

    async def open(self, client: SglangClient) -> None:
        """Form the group; both ends wait for each other."""
        self._number += 1
        port = free_port(self._host)
        group_name = f"{self._name}-{self._number}"
        request = {
            "master_address": self._host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": 1 + self._num_ranks,
            "group_name": group_name,
            "backend": self._backend,
        }
        joined = asyncio.create_task(client.post("/init_weights_update_group", request))
        try:
            self._group = await asyncio.to_thread(
                _form_group, self._host, port, 1 + self._num_ranks, group_name, self._backend
            )
        finally:
            await joined

    async def send(self, client: SglangClient, bucket: NamedTensors, fields: Mapping[str, Any]) -> None:
        request = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": f"{self._name}-{self._number}",
            **fields,
        }
        loaded = asyncio.create_task(client.post("/update_weights_from_distributed", request))
        try:
            # A server that refuses the request never joins the broadcasts: whichever ends first with an error wins.
            sent = asyncio.create_task(asyncio.to_thread(self._broadcast, bucket))
            await asyncio.wait({loaded, sent}, return_when=asyncio.FIRST_EXCEPTION)
            if loaded.done() and loaded.exception() is not None:
                self._abort()
            await sent
        finally:
            await loaded

    async def close(self, client: SglangClient) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        await client.post("/destroy_weights_update_group", {"group_name": f"{self._name}-{self._number}"})
        dist.destroy_process_group(group)

    def _broadcast(self, bucket: NamedTensors) -> None:
        assert self._group is not None, "opened before it sends"
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for _, tensor in bucket:
            # gloo reads the memory it is given, and Ray's is read-only but fit for reading.
            self._group.broadcast([tensor.contiguous().to(self._device)], options).wait()

    def _abort(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _form_group(host: str, port: int, world_size: int, name: str, backend: str) -> dist.ProcessGroup:
    """As SGLang forms its end: a group beside the default one, which this process need not have."""
    store: dist.Store = dist.TCPStore(host, port, world_size, is_master=True, timeout=TIMEOUT)
    group, _ = _new_process_group_helper(
        world_size,
        0,
        [],
        dist.Backend(backend),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        backend_options=None,
        timeout=TIMEOUT,
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group
