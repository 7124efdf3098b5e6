"""RoutedRequests sends requests through an sglang-router; all other calls go to each engine's own server.

    SampleRun ─ RoutedRequests ─ generate ─► router ─► the server that it chooses
                       └──────── abort ─────────────► every server that it has
    Delivery, Supervisor, ... ──────────────────────► the engine's own server

An engine enters its server once it is healthy and has the current weights, and withdraws it before it is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from rollout.sglang_engine.client import NotReached, ServerGone, ServerRefused, SglangClient
from slime_spec.errors import ConfigError

logger = logging.getLogger(__name__)

SETTING = "sglang_server.router_addr"
ENTER_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 10.0
ASK_AGAIN_S = 10.0
POLL_S = 0.2
LIST_AGAIN_S = 1.0


class Requests(Protocol):
    """Generates and aborts samples, on a server or through a router."""

    @property
    def url(self) -> str: ...

    def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]: ...

    async def abort(self, rid: str) -> None: ...


class RoutedRequests:
    """Sends one engine's requests through the router, or to ``own``, its server, where the router cannot be reached.

    ``server_url`` is where the router reaches that server. Lives in the asyncio loop of its two clients.
    """

    def __init__(self, router: SglangClient, own: SglangClient, server_url: str, api_key: str | None) -> None:
        self._router, self._own, self._server_url, self._api_key = router, own, server_url, api_key
        self._goes_around = False
        self._listing = asyncio.Lock()
        self._listed_at, self._urls = -LIST_AGAIN_S, frozenset[str]()

    @property
    def url(self) -> str:
        return self._router.url

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """See SglangClient.stream; the request runs on one server, once."""
        try:
            async with aclosing(self._router.stream(body)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        except NotReached as error:
            if not self._goes_around:
                logger.error("the router cannot be reached: requests go to the engine's own server reason=%s", error)
            self._goes_around = True
        async with aclosing(self._own.stream(body)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def abort(self, rid: str) -> None:
        """Abort the request on every server: only the server that runs it acts; a server that is gone has ended it."""
        aborts = [self._own.at(url).abort(rid) for url in sorted(await self._all_urls())]
        for outcome in await asyncio.gather(*aborts, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, ServerGone | ServerRefused):
                raise outcome

    async def enter(self, timeout_s: float = ENTER_TIMEOUT_S) -> None:
        """Have the router send requests to the server; raises ConfigError when it does not in ``timeout_s``."""
        deadline, ask_at = time.monotonic() + timeout_s, 0.0
        entry = {"url": self._server_url, "disable_health_check": True}
        if self._api_key is not None:
            entry["api_key"] = self._api_key
        last = "it has not answered"
        while time.monotonic() < deadline:
            try:
                if any(server["is_healthy"] for server in await self._servers() if server["url"] == self._server_url):
                    logger.info("the router has the server router=%s server=%s", self._router.url, self._server_url)
                    return
                if time.monotonic() >= ask_at:  # it takes a while, and answers a repeated request with an error
                    ask_at = time.monotonic() + ASK_AGAIN_S
                    await self._router.post("/workers", entry, CALL_TIMEOUT_S)
                    last = "it has not taken the server yet"
            except (ServerGone, ServerRefused) as error:
                last = str(error)
            await asyncio.sleep(POLL_S)
        raise ConfigError(
            SETTING,
            f"must take the server at {self._server_url} within {timeout_s:g} s: {last}",
            self._router.url,
            "Start the router where it can reach that address (--sglang-host), and look in its log.",
        )

    async def withdraw(self) -> None:
        """Have the router drop the server and wait until it has; a router that cannot be reached is only logged."""
        deadline, told = time.monotonic() + CALL_TIMEOUT_S, False
        try:
            while ids := [server["id"] for server in await self._servers() if server["url"] == self._server_url]:
                if not told:
                    await self._router.delete(f"/workers/{ids[0]}", CALL_TIMEOUT_S)
                    told = True
                if time.monotonic() > deadline:
                    logger.warning("the router keeps a server that is withdrawn server=%s", self._server_url)
                    return
                await asyncio.sleep(POLL_S)
        except (ServerGone, ServerRefused) as error:
            logger.warning("the router did not withdraw a server reason=%s", error)

    async def withdraw_dead(self) -> None:
        """Have the router drop every other server that nobody listens for; what cannot be told is only logged."""
        try:
            for server in await self._servers():
                if server["url"] != self._server_url and await self._is_gone(server["url"]):
                    logger.warning("the router drops a server that is gone server=%s", server["url"])
                    await self._router.delete(f"/workers/{server['id']}", CALL_TIMEOUT_S)
        except (ServerGone, ServerRefused) as error:
            logger.warning("the router did not withdraw dead servers reason=%s", error)

    async def _is_gone(self, url: str) -> bool:
        try:
            await self._own.at(url).get("/health", CALL_TIMEOUT_S)
        except NotReached:
            return True
        except (ServerGone, ServerRefused):
            return False  # it listens
        return False

    async def _all_urls(self) -> frozenset[str]:
        """Return the URL of every server that may run a request; the router is asked once for many aborts."""
        async with self._listing:
            if time.monotonic() - self._listed_at > LIST_AGAIN_S:
                try:
                    found = frozenset(server["url"] for server in await self._servers())
                except (ServerGone, ServerRefused):
                    found = self._urls
                self._listed_at, self._urls = time.monotonic(), found | {self._server_url}
            return self._urls

    async def _servers(self) -> list[Mapping[str, Any]]:
        servers: list[Mapping[str, Any]] = (await self._router.get("/workers", CALL_TIMEOUT_S))["workers"]
        return servers
