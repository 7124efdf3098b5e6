"""SglangGeneration gives a caller the samples of a group; a SampleRun generates each of them on a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Protocol
from uuid import uuid4

from rollout.sglang_engine.client import ServerGone, ServerRefused
from rollout.sglang_engine.router import Requests
from rollout.sglang_engine.sample import GrowingSample, Part, Reading
from slime_spec.errors import ConfigError
from slime_spec.partial_samples import FruitlessAttempts
from slime_spec.types import GeneratedSample, GroupRequest

logger = logging.getLogger(__name__)


class Link(Protocol):
    """Connects a sample to a server that may die and come back."""

    @property
    def requests(self) -> Requests: ...

    @property
    def reading(self) -> Reading: ...

    @property
    def weights_key(self) -> str:
        """Return a key that changes whenever the target's weights change."""

    @property
    def draft_version(self) -> int | None: ...

    async def until_ready(self) -> None:
        """Return once requests may be sent; raises what ended the engine for good."""

    def suspect(self) -> None:
        """Have the server checked, because a connection broke."""


class SglangGeneration:
    """Hands the samples of one group from the engine's asyncio thread to the caller's thread."""

    def __init__(self, request: GroupRequest, abort: Callable[[], None]) -> None:
        self.request = request
        self._abort = abort
        self._num_left = len(request.seeds)
        self._arrived: SimpleQueue[GeneratedSample | BaseException] = SimpleQueue()

    def __iter__(self) -> Iterator[GeneratedSample]:
        while self._num_left:
            arrived = self._arrived.get()
            if isinstance(arrived, BaseException):
                raise arrived
            self._num_left -= 1
            yield arrived

    def abort(self) -> None:
        self._abort()

    def deliver(self, arrived: GeneratedSample | BaseException) -> None:
        self._arrived.put(arrived)


class SampleRun:
    """Generates one sample to its end, across servers that die meanwhile. Runs in the asyncio loop."""

    def __init__(self, request: GroupRequest, position: int, link: Link) -> None:
        self._sample = GrowingSample(request, position, link.reading)
        self._link = link
        self._rid: str | None = None
        self._aborted = asyncio.Event()

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have arrived."""
        return self._sample.num_tokens

    async def abort(self) -> None:
        """Let the sample end now with the tokens it has."""
        self._aborted.set()
        if self._rid is not None:
            try:
                await self._link.requests.abort(self._rid)
            except ServerGone:
                self._link.suspect()  # its stream breaks too, and ends the sample
            except ServerRefused as error:  # no reason to lose what it generates
                logger.warning("a sample runs on to its end reason=%s", error)

    async def run(self) -> GeneratedSample:
        """Generate the sample; raises ConfigError for a refused request, RuntimeError when it cannot be finished."""
        start = perf_counter()
        fruitless = FruitlessAttempts()
        while True:
            if not await self._ready():
                return self._sample.finished(perf_counter() - start, self._link.draft_version, aborted=True)
            had = self._sample.num_tokens
            try:
                await self._part()
            except ServerGone as error:
                self._link.suspect()
                is_hopeless = fruitless.note(self._sample.num_tokens > had)
                self._sample.break_off()
                if is_hopeless:
                    raise RuntimeError(f"{self._sample.request.group_id}: its requests break off: {error}") from error
                await self._unless_aborted(asyncio.sleep(fruitless.num))
                if not self._sample.is_complete:
                    continue
            return self._sample.finished(perf_counter() - start, self._link.draft_version)

    async def _ready(self) -> bool:
        """Wait for the server; False where the sample was aborted meanwhile."""
        return await self._unless_aborted(self._link.until_ready())

    async def _unless_aborted(self, waiting: Coroutine[Any, Any, None]) -> bool:
        """Await ``waiting`` and raise its error; False as soon as the sample is aborted."""
        waited = asyncio.ensure_future(waiting)
        aborted = asyncio.ensure_future(self._aborted.wait())
        try:
            await asyncio.wait({waited, aborted}, return_when=asyncio.FIRST_COMPLETED)
            if self._aborted.is_set():
                return False
            waited.result()
            return True
        finally:
            waited.cancel()
            aborted.cancel()

    async def _part(self) -> None:
        request = self._sample.request
        self._rid = f"{request.group_id}-{self._sample.index}-{uuid4().hex[:8]}"
        body = self._sample.body(self._rid, self._link.weights_key)
        part: Part = self._sample.part
        try:
            async for chunk in self._link.requests.stream(body):
                part.take(chunk)
                if self._aborted.is_set() and not part.ended:
                    await self.abort()  # the first abort may have overtaken the request
        except ServerRefused as error:
            raise ConfigError(
                "request", f"SGLang refused it: {error.message}", request.group_id, "Correct the prompt or sampling."
            ) from error
        finally:
            self._rid = None
        if not part.ended:
            raise ServerGone("the stream ended before the response")
