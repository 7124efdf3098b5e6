"""FakeReceiver is a fake server that takes real tensors: from groups that it joins, and from handles of shared memory.

It shows the first rows of the tensors that it has received, as SGLang does, and their checksums.

    python -m tests.support.fake_receiver --port 30000       # as a process, in place of sglang.launch_server
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web

from rollout.sglang_engine.fake import FakeServer, main
from rollout.sglang_engine.fake_http import Body
from slime_spec.transports.store import form_group
from slime_spec.weights.checksums import tensor_checksum

TIMEOUT = timedelta(seconds=30)


class FakeReceiver(FakeServer):
    """Has one rank, which joins every group that it is asked to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._received: dict[str, dict[str, torch.Tensor]] = {"target": {}, "draft": {}}

    def posts(self) -> Any:
        groups = {"/init_weights_update_group": self._join, "/destroy_weights_update_group": self._leave}
        return {**super().posts(), **groups}

    async def _join(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        try:
            group = await asyncio.to_thread(_formed, body)
        except (RuntimeError, ValueError) as error:
            return _answer(400, f"Failed to initialize custom process group: {error}.")
        self._groups[body["group_name"]] = group
        return _answer(200, "Succeeded to initialize custom process group.")

    async def _leave(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        group = self._groups.pop(body["group_name"], None)
        if group is None:
            return _answer(400, "The group to be destroyed does not exist.")
        await asyncio.to_thread(dist.destroy_process_group, group)
        return _answer(200, "Succeeded to destroy custom process group.")

    async def _load(self, path: str, body: Body) -> None:
        if "names" in body:
            received = await asyncio.to_thread(self._broadcast, body)
        else:
            (handles,) = body["serialized_named_tensors"]
            received = {name: tensor.clone() for name, tensor in pickle.loads(base64.b64decode(handles))}
        for side in self._sides(body):
            self._received[side] |= received

    def _broadcast(self, body: Body) -> dict[str, torch.Tensor]:
        group, received = self._groups[body["group_name"]], {}
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(received[name], src=0, group=group)
        return received

    async def _rows(self, request: web.Request) -> web.Response:
        tensor = self._received["target"].get((await self._body(request))["name"])
        return web.json_response(None if tensor is None else tensor[:2].float().tolist())

    async def _check(self, request: web.Request) -> web.Response:
        side = (await self._body(request))["selector"]
        sums = {name: f"{tensor_checksum(tensor):x}" for name, tensor in self._received[side].items()}
        return web.json_response({"ranks": [{"checksums": {f"{side}.of_the_checkpoint": "0", **sums}}]})


def _formed(body: Body) -> dist.ProcessGroup:
    address, port = body["master_address"], body["master_port"]
    store = dist.TCPStore(address, port, timeout=TIMEOUT, wait_for_workers=False)
    rank, size = body["rank_offset"], body["world_size"]
    return form_group(store, rank, size, body["group_name"], body["backend"], TIMEOUT)


def _answer(status: int, message: str) -> web.Response:
    return web.json_response({"success": status == 200, "message": message}, status=status)


if __name__ == "__main__":
    main(make=FakeReceiver)
