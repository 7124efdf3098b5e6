"""FakeHttp answers the HTTP calls of a fake SGLang server, checks their API key, and records them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from aiohttp import web

Body = dict[str, Any]
State = Literal["serves", "dead", "hangs"]
Handlers = Mapping[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]


class FakeHttp:
    """Answers the calls that ``posts`` and ``gets`` name; ``calls`` records each call as (path, body), in order.

    ``heard`` are the paths of all calls, answered or not. A server that is ``dead`` breaks every connection, and a
    server that ``hangs`` accepts calls and never answers; ``fail`` says at which call it becomes so. ``odd`` are
    answers in place of those that calls of a path would get.
    """

    def __init__(self, api_key: str | None = None) -> None:
        self.api_key = api_key
        self.calls: list[tuple[str, Body]] = []
        self.heard: list[str] = []
        self.state: State = "serves"
        self.odd: dict[str, list[web.Response]] = {}
        self._faults: dict[tuple[str, int], State] = {}

    def fail(self, path: str, nth: int, state: State) -> None:
        """Go into ``state`` at the ``nth`` call of ``path`` from now on, counted from 1, which gets no answer."""
        self._faults[path, self.heard.count(path) + nth] = state

    def posts(self) -> Handlers:
        return {}

    def gets(self) -> Handlers:
        return {"/health": self._ok}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30, middlewares=[self._failing, self._authorized])
        app.add_routes([web.post(path, handler) for path, handler in self.posts().items()])
        app.add_routes([web.get(path, handler) for path, handler in self.gets().items()])
        return app

    def told(self, path: str) -> list[Body]:
        """Return the bodies of all calls of a path."""
        return [body for called, body in self.calls if called == path]

    @web.middleware
    async def _failing(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.heard.append(request.path)
        self.state = self._faults.pop((request.path, self.heard.count(request.path)), self.state)
        if self.state == "hangs":
            await asyncio.Event().wait()
        if self.state == "dead":
            assert request.transport is not None, "connected"
            request.transport.abort()
            raise asyncio.CancelledError
        if odd := self.odd.get(request.path):
            return odd.pop(0)
        answer: web.StreamResponse = await handler(request)
        return answer

    @web.middleware
    async def _authorized(self, request: web.Request, handler: Any) -> web.StreamResponse:
        is_open = self.api_key is None or request.path.startswith("/health")
        if not is_open and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _body(self, request: web.Request) -> Body:
        body: Body = await request.json() if request.can_read_body else {}
        self.calls.append((request.path, body))
        return body

    async def _ok(self, request: web.Request) -> web.Response:
        await self._body(request)
        return web.json_response({"success": True, "message": ""})
