"""These endpoints control generation: abort, pause and continue, flush, release and resume."""

from __future__ import annotations

from aiohttp import web

from rollout.embedded.http.json_io import json_response, read_fields, refusal
from rollout.embedded.http.serving import Serving
from rollout.embedded.loop_thread import Refused
from slime_spec.errors import ConfigError
from slime_spec.weights.messages import ContinueGeneration, PauseGeneration, PauseMode

PAUSE_MODES: tuple[PauseMode, ...] = ("abort", "retract", "in_place")
MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
FLUSHED = "Cache flushed.\n"
BUSY = "Flush cache failed: requests are running or waiting.\n"


class ControlRoutes:
    """Handles the control endpoints; ``paused`` says whether generation was paused through this server."""

    def __init__(self, serving: Serving) -> None:
        self._engine, self._generations, self._control = serving.engine, serving.generations, serving.control
        self._released: set[str] = set()
        self.paused = False

    @property
    def released(self) -> bool:
        return bool(self._released)

    def routes(self) -> list[web.RouteDef]:
        either = {
            "/flush_cache": self._flush,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
        }
        return [
            web.post("/abort_request", self._abort),
            web.post("/pause_generation", self._pause),
            web.post("/continue_generation", self._continue),
            *(web.post(path, handler) for path, handler in either.items()),
            *(web.get(path, handler) for path, handler in either.items()),
        ]

    async def _abort(self, request: web.Request) -> web.Response:
        """Abort requests; an unknown id is no error, because its request may just have finished."""
        fields = await read_fields(request)
        if fields.switch("abort_all"):
            await self._generations.abort_all()
        elif rid := fields.text("rid"):
            self._generations.abort(rid)
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        """Pause generation; what runs is aborted, recomputed later, or kept as it is."""
        fields = await read_fields(request)
        mode = fields.choice("mode", PAUSE_MODES, "abort")
        self.paused = True
        await self._control.run(lambda: self._engine.update_weights(PauseGeneration(self._version, mode)))
        if mode == "abort":
            await self._generations.abort_all()
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        """Let paused generation go on."""
        await read_fields(request)
        await self._control.run(lambda: self._engine.update_weights(ContinueGeneration(self._version)))
        self.paused = False
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush(self, request: web.Request) -> web.Response:
        """Answer whether the engine is idle, as SGLang's clients ask; no cache outlives a request."""
        stats = self._engine.stats()
        if self._generations.num_prompts or stats.num_running or stats.num_waiting:
            return web.Response(status=400, text=BUSY)
        return web.Response(text=FLUSHED)

    async def _release(self, request: web.Request) -> web.Response:
        """Release the engine's memory as a whole with the first tag; it comes back with the last."""
        tags = await _tags(request)
        if not self._released:
            try:
                await self._control.run(lambda: self._engine.set_resident(False))
            except Refused as error:
                return refusal(400, str(error))
        self._released |= tags
        return json_response(None)

    async def _resume(self, request: web.Request) -> web.Response:
        """Take back the engine's memory with the last of its tags."""
        tags = await _tags(request)
        if beyond := sorted(tags - self._released):
            return refusal(400, f"not released: {', '.join(beyond)}")
        if self._released == tags:
            await self._control.run(lambda: self._engine.set_resident(True))
        self._released -= tags
        return json_response(None)

    @property
    def _version(self) -> int:
        return self._engine.weight_version


async def _tags(request: web.Request) -> set[str]:
    tags = (await read_fields(request)).texts("tags")
    if unknown := [tag for tag in tags if tag not in MEMORY_TAGS]:
        raise ConfigError(
            "tags", f"must be among {', '.join(MEMORY_TAGS)}", unknown[0], "Leave it out for all of them."
        )
    return set(tags or MEMORY_TAGS)
