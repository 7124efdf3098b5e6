"""FakeWeights answers a fake server's calls about weights and memory: sessions, checksums, versions, no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from rollout.sglang_engine.fake_http import Body, FakeHttp, Handlers
from rollout.sglang_engine.recordings import recordings


class FakeWeights(FakeHttp):
    """Takes weight updates like the release whose request fields were recorded as ``contract``."""

    def __init__(self, contract: str, api_key: str | None = None) -> None:
        super().__init__(api_key)
        self.tensor_fields: list[str] = recordings()["tensor_fields"][contract]
        self.has_session = "selector" in self.tensor_fields
        self.weight_version = "0"
        self.session: str | None = None
        self.sums = {"target": 0, "draft": 0}
        self.rows: Mapping[str, Any] = {}
        self.target_sums: Mapping[str, str] | None = None  # of single tensors, as a server may have them
        self.memory_released = False

    def posts(self) -> Handlers:
        posts = {
            "/update_weights_from_tensor": self._update,
            "/update_weights_from_distributed": self._update,
            "/update_weights_from_disk": self._from_disk,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
            "/init_weights_update_group": self._ok,
            "/destroy_weights_update_group": self._ok,
            "/get_weights_by_name": self._rows,
            "/update_weight_version": self._rename,
        }
        if self.has_session:
            posts |= {
                "/begin_weight_update": self._begin,
                "/end_weight_update": self._end,
                "/weights_checker": self._check,
            }
        return {**super().posts(), **posts}

    async def _begin(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        if self.session is not None:
            return _refused(recordings()["errors"]["session_open"])
        self.session = body.get("selector", "all")
        return _done()

    async def _end(self, request: web.Request) -> web.Response:
        await self._body(request)
        if self.session is None:
            return _refused(recordings()["errors"]["no_begin"])
        self.session = None
        return _done()

    async def _update(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        if self.has_session and self.session is None:
            return _refused(recordings()["errors"]["no_session"])
        for side in self._sides(body):
            self.sums[side] += 1
        await self._load(request.path, body)
        self.weight_version = body.get("weight_version") or self.weight_version
        return _done()

    async def _load(self, path: str, body: Body) -> None:
        """Load the tensors of an update: this server has none."""

    def _sides(self, body: Body) -> Sequence[str]:
        if self.has_session:
            selector = body.get("selector", "all")
            return ("target", "draft") if selector == "all" else (selector,)
        return ("target",) if body.get("disable_draft_model") else ("target", "draft")

    async def _from_disk(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        body["files"] = sorted(path.name for path in Path(body["model_path"]).iterdir())
        self.sums = {side: value + 1 for side, value in self.sums.items()}
        self.weight_version = body.get("weight_version") or self.weight_version
        return _done()

    async def _check(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        sides = ("target", "draft") if body.get("selector", "all") == "all" else (body["selector"],)
        checksums = {f"{side}.model.norm.weight": f"{side}-{self.sums[side]:x}" for side in sides}
        if self.target_sums is not None and "target" in sides:
            checksums |= self.target_sums
        return web.json_response({"success": True, "message": "Success", "ranks": [{"checksums": checksums}]})

    async def _rename(self, request: web.Request) -> web.Response:
        self.weight_version = (await self._body(request))["new_version"]
        return _done()

    async def _rows(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        return web.json_response(self.rows.get(body["name"]))

    async def _release(self, request: web.Request) -> web.Response:
        self.memory_released = True
        return await self._ok(request)

    async def _resume(self, request: web.Request) -> web.Response:
        if not self.memory_released:  # SGLang's scheduler dies of this call
            return web.json_response({"error": "KeyError: 'kv_cache'"}, status=500)
        self.memory_released = False
        return await self._ok(request)


def _done() -> web.Response:
    return web.json_response({"success": True, "message": "Success"})


def _refused(message: str) -> web.Response:
    return web.json_response({"success": False, "message": message}, status=400)
