"""POST /generate answers one prompt, a batch or several samples, whole or as server-sent events."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from rollout.embedded.http.answers import Answer, AnswerWriter, Chunks
from rollout.embedded.http.calls import Call, CallReader
from rollout.embedded.http.generations import Event, Finished
from rollout.embedded.http.json_io import json_response
from rollout.embedded.http.running import CallRunner


class GenerateRoutes:
    """Handles /generate; answers are in the order of the prompts, a prompt's samples side by side.

    A stream's chunks hold everything so far, or with ``incremental`` only what is new (SGLang's
    ``--incremental-streaming-output``); a call with several answers marks each chunk with its ``index``.
    """

    def __init__(self, runner: CallRunner, reader: CallReader, writer: AnswerWriter, incremental: bool) -> None:
        self._runner, self._reader, self._writer, self._incremental = runner, reader, writer, incremental

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/generate", self._generate), web.put("/generate", self._generate)]

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        """Generate from texts or token ids, in SGLang's own form."""
        call = await self._runner.read(request, self._reader.read)
        if call.stream:
            chunks = Chunks(call, self._writer, self._incremental)
            return await self._runner.stream(request, call, partial(self._chunks, call, chunks))
        answers = [self._finished(call, each) for each in await self._runner.whole(call)]
        return json_response(answers if call.is_list else answers[0])

    def _chunks(self, call: Call, chunks: Chunks, event: Event) -> list[Answer]:
        if isinstance(event, Finished):
            return [chunks.last(event, self._finished(call, event))]
        answer = chunks.gained(event)
        return [] if answer is None else [answer]

    def _finished(self, call: Call, event: Finished) -> Answer:
        return self._writer.finished(call, call.prompts[event.prompt], event.sample)
