"""No client can hold the server: bodies, answers and silent connections have deadlines, and bodies have bounds.

connection ──► patience_s until its first request, and between two requests
body       ──► patience_s, and more for what has come at SLOWEST_BYTES_PER_S; all bodies together have a bound
answer     ──► the same; a client that does not read is cut off, and what it asked for is aborted
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from slime_spec.errors import ConfigError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SLOWEST_BYTES_PER_S = 1 << 16
MAX_TEXT_BODY_BYTES = 32_000_000  # of requests without weights; lists of lists take twenty times their text in memory
BODIES_AT_ONCE = 2  # as large as a body may be: further bodies wait for their client's next try


class Busy(RuntimeError):
    """Says that the server has no room for a request now; the client may send the request again."""


class Clients:
    """Holds what the server allows its clients."""

    def __init__(
        self, max_body_bytes: int, patience_s: float, slowest_bytes_per_s: float = SLOWEST_BYTES_PER_S
    ) -> None:
        self._max_body_bytes, self._patience_s = max_body_bytes, patience_s
        self._slowest_bytes_per_s = slowest_bytes_per_s
        self._held_bytes = 0  # by bodies that have not come whole
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}

    def connection(self, server: web.Server) -> web.RequestHandler:
        """Return the protocol of a new connection, which is closed where no request comes."""
        protocol = server()
        loop = asyncio.get_running_loop()
        self._silent[protocol] = loop.call_later(self._patience_s, self._close_silent, protocol)
        return protocol

    def _close_silent(self, protocol: web.RequestHandler) -> None:
        del self._silent[protocol]
        protocol.force_close()

    async def body(self, request: web.Request, max_bytes: int = MAX_TEXT_BODY_BYTES) -> bytes:
        """Return a request's body; raises HTTPRequestEntityTooLarge, HTTPRequestTimeout, ConfigError or Busy."""
        most = min(max_bytes, self._max_body_bytes)
        if (request.content_length or 0) > most:
            raise web.HTTPRequestEntityTooLarge(most, request.content_length or 0)
        body = bytearray()
        try:
            async with self._deadline(lambda: len(body)) as reschedule:
                while chunk := await request.content.readany():
                    body += chunk
                    self._held_bytes += len(chunk)
                    if len(body) > most:
                        raise web.HTTPRequestEntityTooLarge(most, len(body))
                    if self._held_bytes > BODIES_AT_ONCE * self._max_body_bytes:
                        raise Busy("other requests' bodies fill the memory for bodies: send this one again")
                    reschedule()
        except TimeoutError:
            raise web.HTTPRequestTimeout from None
        except web.RequestPayloadError as error:
            remedy = "Send as many bytes as its headers say, encoded as they say."
            raise ConfigError("body", f"must be readable: {error}", "?", remedy) from None
        finally:
            self._held_bytes -= len(body)
        return bytes(body)

    @asynccontextmanager
    async def sending(self, request: web.Request, num_bytes: int = 0) -> AsyncIterator[None]:
        """Cut the client off, and raise ConnectionError, where the block, which sends ``num_bytes``, takes too long."""
        try:
            async with self._deadline(lambda: num_bytes):
                yield
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionAbortedError("the client does not read its answer") from None

    @asynccontextmanager
    async def _deadline(self, num_bytes: Callable[[], int]) -> AsyncIterator[Callable[[], None]]:
        """Raise TimeoutError after the patience and the time that so many bytes may take."""
        loop = asyncio.get_running_loop()
        start = loop.time()

        def deadline() -> float:
            return start + self._patience_s + num_bytes() / self._slowest_bytes_per_s

        async with asyncio.timeout_at(deadline()) as timeout:
            yield lambda: timeout.reschedule(deadline())

    @web.middleware
    async def watched(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note that the connection is not silent, and send whole answers in time."""
        if (timer := self._silent.pop(request.protocol, None)) is not None:
            timer.cancel()
        response = await handler(request)
        if isinstance(response, web.Response) and not response.prepared:
            async with self.sending(request, response.content_length or 0):
                await response.prepare(request)
                await response.write_eof()
                await request.writer.drain()
        return response


OF_CLIENTS = (HttpProcessingError, web.RequestPayloadError, ConnectionError)


class NoTracebackOfClients(logging.Filter):
    """Drops what aiohttp logs as an error where a client does not speak HTTP, which it is told, or has gone."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], OF_CLIENTS))


protocol_logger = logging.getLogger(f"{__name__}.protocol")
protocol_logger.addFilter(NoTracebackOfClients())
CLIENTS = web.AppKey("clients", Clients)
