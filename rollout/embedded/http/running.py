"""A runner takes calls from a request's body to the events of their samples; routes write the answers.

request ── read ──► call ── whole ──► samples in the order of the prompts, a prompt's side by side
                         └─ stream ─► server-sent events, ended by [DONE]; a client that goes aborts them
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from aiohttp import web

from rollout.embedded.http.calls import Call
from rollout.embedded.http.clients import CLIENTS
from rollout.embedded.http.generations import EngineEnded, Event, Finished
from rollout.embedded.http.json_io import FAILED, error_body, parsed, written
from rollout.embedded.http.serving import Serving
from rollout.embedded.loop_thread import Refused
from slime_spec.errors import ConfigError, GenerationError

logger = logging.getLogger(__name__)

T = TypeVar("T")
LARGE_TEXT_BYTES = 1 << 13  # of a body: to read more may take tens of milliseconds
Answers = Iterable[object]


class CallRunner:
    """Runs the calls of one server, and counts every finished sample."""

    def __init__(self, serving: Serving) -> None:
        self._generations, self._totals, self._reading = serving.generations, serving.totals, serving.reading

    async def read(self, request: web.Request, reader: Callable[[object], T]) -> T:
        """Return what ``reader`` makes of the body; where that takes long, other requests are not kept waiting."""
        body = await request.app[CLIENTS].body(request)
        read = partial(_read, reader, body)
        return await self._reading.run(read) if len(body) > LARGE_TEXT_BYTES else read()

    async def whole(self, call: Call) -> list[Finished]:
        """Return the finished samples of a call, in the order of its answers."""
        finished = []
        async with aclosing(self._events(call)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    finished.append(event)
        return sorted(finished, key=lambda each: (each.prompt, each.sample.sample_index))

    async def stream(
        self, request: web.Request, call: Call, chunks: Callable[[Event], Answers], last: Callable[[], Answers] = tuple
    ) -> web.StreamResponse:
        """Send what ``chunks`` makes of each event, and ``last`` when all samples are finished."""
        async with aclosing(self._events(call)) as events:
            first = await anext(events)  # what the engine refuses is still an ordinary answer here
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
            await response.prepare(request)
            write = partial(_write, request, response)
            try:
                await write(chunks(first))
                async for event in events:
                    await write(chunks(event))
                await write(last())
            except ConnectionError:
                raise  # the client is gone: nobody reads the error
            except Exception as error:  # noqa: BLE001 - the status has been sent: the stream says what went wrong
                await write([_failure(call, error)])
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
            return response

    async def _events(self, call: Call) -> AsyncGenerator[Event]:
        requests, records = zip(*((each.request, each.record) for each in call.prompts), strict=True)
        async with aclosing(self._generations.events(call.rid, requests, call.stream, records)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self._totals.count(event.sample)
                yield event


def _read(reader: Callable[[object], T], body: bytes) -> T:
    return reader(parsed(body))


def _failure(call: Call, error: Exception) -> object:
    if isinstance(error, EngineEnded | Refused):
        return error_body(503, str(error), "internal_error")
    if isinstance(error, GenerationError):
        return error_body(500, str(error), "internal_error")
    if isinstance(error, ConfigError):
        return error_body(400, str(error), "invalid_request_error")
    logger.error("stream failed rid=%s", call.rid, exc_info=error)
    return error_body(500, FAILED, "internal_error")


async def _write(request: web.Request, response: web.StreamResponse, answers: Answers) -> None:
    """Send chunks; raises ConnectionError where the client has gone, or reads nothing."""
    for answer in answers:
        chunk = b"data: " + written(answer).encode() + b"\n\n"
        async with request.app[CLIENTS].sending(request, len(chunk)):
            await response.write(chunk)
