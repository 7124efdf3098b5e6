"""SglangClient calls one server over HTTP; its errors say whether the server may have done anything.

Nothing is retried here. A call that was refused did nothing; after ServerGone nobody knows, and the caller decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp

from slime_spec.sglang.server_info import PATHS

CONTROL_TIMEOUT_S = 600.0
ABORT_TIMEOUT_S = 30.0
# The header that sglang-router sets on answers of its own, which come from no server.
ROUTER_ERROR = "x-smg-error-code"
# A streamed chunk of many samples' logprobs is one line, longer than aiohttp's own limit.
LONGEST_LINE = 256 * 1024 * 1024
# SGLang closes a connection that was idle for 5 s; a request that meets the closing looks like a server that died.
KEEP_ALIVE_S = 1.0


class ServerRefused(RuntimeError):
    """The server answered with an error; it is alive and did not do what was asked.

    ``retry_after_s`` is the wait that the server asks for, 0 where it asks for none.
    """

    def __init__(self, path: str, status: int, message: str, retry_after_s: float = 0.0) -> None:
        self.path, self.status, self.message, self.retry_after_s = path, status, message, retry_after_s
        super().__init__(f"{path} was refused ({status}): {message}")

    def __reduce__(self) -> tuple[type, tuple[str, int, str, float]]:
        return type(self), (self.path, self.status, self.message, self.retry_after_s)


class ServerGone(ConnectionError):
    """The connection failed or broke, or no answer came in time."""


class ProtocolError(RuntimeError):
    """The server's answer cannot be read, or cannot be true."""


class NotReached(ServerGone):
    """There was no connection: nothing was sent."""


class SglangClient:
    """Calls one server, or a router; belongs to the asyncio loop in which ``open`` ran.

    A server that does not answer a ``post`` within ``call_timeout_s`` is gone.
    """

    def __init__(self, url: str, api_key: str | None = None, call_timeout_s: float = CONTROL_TIMEOUT_S) -> None:
        self.url, self._call_timeout_s = url, call_timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def open(self) -> None:
        # Every sample being generated holds a connection: the server's own queue is the limit, not aiohttp's 100.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, read_bufsize=2**20)

    def at(self, url: str) -> SglangClient:
        """Return a client of another server, which can be used as long as this client is open."""
        other = SglangClient(url, call_timeout_s=self._call_timeout_s)
        other._session = self._session
        return other

    @asynccontextmanager
    async def apart(self) -> AsyncIterator[SglangClient]:
        """Yield a client of the same server with connections of its own, for calls that the server may fail on.

        A server closes the connection of a call that failed in it; whoever takes that connection next would see a
        server that is gone.
        """
        other = SglangClient(self.url, call_timeout_s=self._call_timeout_s)
        other._headers = self._headers
        await other.open()
        try:
            yield other
        finally:
            await other.close()

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, timeout_s: float = 60.0) -> Any:
        return await self._call("GET", path, None, min(timeout_s, self._call_timeout_s))

    async def post(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        """Return the answer's JSON, or its text where it is not JSON; raises ServerRefused or ServerGone."""
        return await self._call("POST", path, body or {}, timeout_s or self._call_timeout_s)

    async def delete(self, path: str, timeout_s: float) -> Any:
        return await self._call("DELETE", path, None, timeout_s)

    async def abort(self, rid: str) -> None:
        """End a request with the tokens it has; a request that the server does not know is no error."""
        await self.post("/abort_request", {"rid": rid}, ABORT_TIMEOUT_S)

    async def answers(self, timeout_s: float) -> bool:
        """Return whether the server's scheduler answers, also while it is paused; nothing is generated for it."""
        for path in PATHS:
            try:
                await self.get(path, timeout_s)
            except ServerRefused as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    return error.status < HTTPStatus.INTERNAL_SERVER_ERROR
            except ServerGone:
                return False
            else:
                return True
        return True

    async def is_healthy(self, timeout_s: float = 10.0) -> bool:
        """Return whether a server that starts has begun to serve; of a server that is paused this is False."""
        try:
            await self.get("/health", timeout_s)
        except (ServerRefused, ServerGone):
            return False
        return True

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the chunks of one streamed /generate, until the server's [DONE].

        Raises ServerGone when the stream breaks off, ServerRefused for an error, also one sent as a chunk, and
        ProtocolError for what is no JSON object.
        """
        url = f"{self.url}/generate"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
        try:
            async with self._session.post(url, json={**body, "stream": True}, timeout=timeout) as response:
                if response.status == 503 and ROUTER_ERROR not in response.headers:
                    raise ServerRefused(url, 503, _message(await _text(response)), _retry_after_s(response))
                if response.status != 200:
                    raise _refusal(url, response, await _text(response))
                async for data in _events(response.content):
                    if data == b"[DONE]":
                        return
                    yield _chunk(url, data)
        except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
            raise _broken(url, error) from error
        raise ServerGone(f"{url}: the stream ended before the response")

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                text = await _text(response)
        except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
            raise _broken(f"{self.url}{path}", error) from error
        if response.status not in (200, 202):
            raise _refusal(path, response, text)
        try:
            return json.loads(text) if text else None
        except (ValueError, RecursionError):
            return text


async def _text(response: aiohttp.ClientResponse) -> str:
    """Return the body; bytes that are no text are replaced, as whoever reads them finds them odd anyway."""
    return await response.text(errors="replace")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the data of each server-sent event."""
    pending = bytearray()
    async for block in content.iter_any():
        pending += block
        if len(pending) > LONGEST_LINE:
            raise ConnectionError(f"an event of more than {LONGEST_LINE} bytes")
        *lines, rest = pending.split(b"\n")
        pending = bytearray(rest)
        for line in lines:
            if line.startswith(b"data:"):
                yield bytes(line[5:]).strip()


def _chunk(url: str, data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"an event that is no JSON ({error}): {data[:200]!r}") from None
    if not isinstance(chunk, dict):
        raise ProtocolError(f"an event that is no JSON object: {data[:200]!r}")
    if "error" in chunk:
        code = chunk["error"].get("code") if isinstance(chunk["error"], dict) else None
        raise ServerRefused(url, code if type(code) is int else 400, _message(data.decode()))
    return chunk


def _broken(url: str, error: Exception) -> ServerGone:
    kind = NotReached if isinstance(error, aiohttp.ClientConnectorError) else ServerGone
    return kind(f"{url}: {type(error).__name__} {error}")


def _refusal(path: str, response: aiohttp.ClientResponse, text: str) -> ServerRefused | ServerGone:
    """Return the error of a refusal; a 5xx of a starting or ending server, or of its router, says: nothing was done."""
    status = response.status
    if status in (502, 503, 504) or (status == 500 and ROUTER_ERROR in response.headers):
        return ServerGone(f"{path}: {status} {_message(text)}")
    return ServerRefused(path, status, _message(text), _retry_after_s(response))


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    """Return the seconds of a Retry-After header (RFC 9110); 0 where there is none, or a date."""
    seconds = response.headers.get("Retry-After", "")
    return float(seconds) if re.fullmatch("[0-9]{1,9}", seconds) else 0.0


def _message(text: str) -> str:
    """Return the message of a server's error, which comes in several shapes."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()[:2000]
    found = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(found, dict):
        found = found.get("message", found.get("detail", found))
    return str(found)[:2000]
