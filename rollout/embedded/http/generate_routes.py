"""POST /generate answers one prompt, a batch or several samples, whole or as server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

from aiohttp import web

from rollout.embedded.http.answers import Answer, AnswerWriter, Chunks
from rollout.embedded.http.calls import Call, CallReader
from rollout.embedded.http.clients import CLIENTS
from rollout.embedded.http.generations import EngineEnded, Event, Finished
from rollout.embedded.http.json_io import FAILED, error_body, json_response, parsed, written
from rollout.embedded.http.serving import Serving
from rollout.embedded.loop_thread import Refused
from slime_spec.errors import ConfigError, GenerationError

logger = logging.getLogger(__name__)

LARGE_TEXT_BYTES = 1 << 13  # of a body: to read more may take tens of milliseconds
Write = Callable[[Answer], Awaitable[None]]
Place = tuple[int, int]
"""(index of the prompt in its call, index of the sample among the prompt's)"""


class GenerateRoutes:
    """Handles /generate; answers are in the order of the prompts, a prompt's samples side by side.

    A stream's chunks hold everything so far, or with ``incremental`` only what is new (SGLang's
    ``--incremental-streaming-output``); a call with several answers marks each chunk with its ``index``.
    """

    def __init__(self, serving: Serving, reader: CallReader, writer: AnswerWriter, incremental: bool) -> None:
        self._generations, self._totals, self._reading = serving.generations, serving.totals, serving.reading
        self._reader, self._writer, self._incremental = reader, writer, incremental

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/generate", self._generate), web.put("/generate", self._generate)]

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        call = await self._read(request)
        requests = [prompt.request for prompt in call.prompts]
        async with aclosing(self._generations.events(call.rid, requests, progress=call.stream)) as events:
            return await (self._stream(request, call, events) if call.stream else self._whole(call, events))

    async def _read(self, request: web.Request) -> Call:
        """Return the call, its texts tokenised; where that takes long, other requests are not kept waiting."""
        body = await request.app[CLIENTS].body(request)
        return await self._reading.run(partial(self._call, body)) if len(body) > LARGE_TEXT_BYTES else self._call(body)

    def _call(self, body: bytes) -> Call:
        return self._reader.read(parsed(body))

    async def _whole(self, call: Call, events: AsyncIterator[Event]) -> web.Response:
        answers: dict[Place, Answer] = {}
        async for event in events:
            if isinstance(event, Finished):
                place = event.prompt, event.sample.sample_index
                answers[place] = self._finished(call, event)
        ordered = [answers[place] for place in sorted(answers)]
        return json_response(ordered if call.is_list else ordered[0])

    async def _stream(self, request: web.Request, call: Call, events: AsyncIterator[Event]) -> web.StreamResponse:
        first = await anext(events)  # what the engine refuses is still an ordinary answer here
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        chunks = Chunks(call, self._writer, self._incremental)
        write = partial(_write, request, response)
        try:
            await self._send(write, call, chunks, first)
            async for event in events:
                await self._send(write, call, chunks, event)
        except (EngineEnded, Refused) as error:  # the answer's status has been sent: the stream says what went wrong
            await write(error_body(503, str(error), "internal_error"))
        except GenerationError as error:
            await write(error_body(500, str(error), "internal_error"))
        except ConfigError as error:
            await write(error_body(400, str(error), "invalid_request_error"))
        except ConnectionError:
            raise  # the client is gone: nobody reads the error
        except Exception:
            logger.exception("stream failed rid=%s", call.rid)
            await write(error_body(500, FAILED, "internal_error"))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _send(self, write: Write, call: Call, chunks: Chunks, event: Event) -> None:
        if (answer := self._chunk(call, chunks, event)) is not None:
            await write(answer)

    def _chunk(self, call: Call, chunks: Chunks, event: Event) -> Answer | None:
        if isinstance(event, Finished):
            return chunks.last(event, self._finished(call, event))
        return chunks.gained(event)

    def _finished(self, call: Call, event: Finished) -> Answer:
        self._totals.count(event.sample)
        return self._writer.finished(call, call.prompts[event.prompt], event.sample)


async def _write(request: web.Request, response: web.StreamResponse, answer: Answer) -> None:
    """Send a chunk; raises ConnectionError where the client has gone, or reads nothing."""
    chunk = b"data: " + written(answer).encode() + b"\n\n"
    async with request.app[CLIENTS].sending(request, len(chunk)):
        await response.write(chunk)
