"""SglangGeneration gives a caller the samples of a group; a SampleRun generates each of them on a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from http import HTTPStatus
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Protocol
from uuid import uuid4

from rollout.sglang_engine.client import ProtocolError, ServerGone, ServerRefused
from rollout.sglang_engine.router import Requests
from rollout.sglang_engine.sample import GrowingSample, Part, Reading
from slime_spec.errors import ConfigError
from slime_spec.partial_samples import FruitlessAttempts
from slime_spec.types import EarlierReply, GeneratedSample, GroupRequest

logger = logging.getLogger(__name__)

Interruption = ServerGone | ServerRefused | ProtocolError

# Of the request, which no server will ever take.
BAD_REQUEST = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
# Of a server that has too much to do, or starts, or ends: it may take the request later.
BUSY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 5.0
LONGEST_RETRY_AFTER_S = 60.0  # of what a busy server asks for
LONGEST_BUSY_S = 900.0  # waited in all for a busy server without a token


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

    def opened(self, stream: str) -> None:
        """Note that a stream begins: it is a sign of its server's life when it brings something."""

    def heard(self, stream: str) -> None: ...

    def brought(self, stream: str, num_tokens: int) -> None: ...

    def closed(self, stream: str) -> None: ...

    def suspect(self) -> None:
        """Have the server checked, because a connection broke."""

    def interrupted(self, reason: Interruption) -> None:
        """Count a part that ended before its response, and have the server checked."""


class SglangGeneration:
    """Hands the samples of one group from the engine's asyncio thread to the caller's thread."""

    def __init__(
        self, request: GroupRequest, abort: Callable[[], None], learn: Callable[[Sequence[EarlierReply]], None]
    ) -> None:
        self.request = request
        self._abort, self._learn = abort, learn
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

    def learn(self, replies: Sequence[EarlierReply]) -> None:
        """See Generation; only a server whose corpus is fed drafts from them."""
        self._learn(replies)

    def deliver(self, arrived: GeneratedSample | BaseException) -> None:
        self._arrived.put(arrived)


class Aborted(ServerRefused):
    """The server ended the request by itself; ``status`` is 0 where it names none."""


class Patience:
    """Says how long a sample waits before its next part, and when it has had too many."""

    def __init__(self) -> None:
        self._fruitless = FruitlessAttempts()
        self._num_busy, self._busy_s = 0, 0.0

    def delay_s(self, reason: Interruption, brought_tokens: bool) -> float | None:
        """Return the seconds to wait after a part that brought tokens or none; None to give up."""
        if isinstance(reason, ServerRefused) and reason.status in BUSY:
            self._num_busy, self._busy_s = (0, 0.0) if brought_tokens else (self._num_busy + 1, self._busy_s)
            asked_s = min(reason.retry_after_s, LONGEST_RETRY_AFTER_S)
            delay_s = max(asked_s, min(FIRST_DELAY_S * 2.0**self._num_busy, LONGEST_DELAY_S))
            self._busy_s += delay_s
            return delay_s if self._busy_s <= LONGEST_BUSY_S else None
        return None if self._fruitless.note(brought_tokens) else float(self._fruitless.num)


class SampleRun:
    """Generates one sample to its end, across servers that die or refuse it meanwhile. Runs in the asyncio loop."""

    def __init__(self, request: GroupRequest, position: int, link: Link) -> None:
        self._sample = GrowingSample(request, position, link.reading)
        self._link = link
        self._rid: str | None = None
        self._aborted = asyncio.Event()
        self._parting: asyncio.Task[None] | None = None
        self._lost = ""

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have arrived."""
        return self._sample.num_tokens

    def expect_abort(self) -> None:
        """Let the sample end with the tokens it has when the server aborts it."""
        self._aborted.set()

    def lose(self, why: str) -> None:
        """End the part, because its server is taken for lost."""
        if self._parting is not None:
            self._lost = why
            self._parting.cancel()

    async def abort(self) -> None:
        """Let the sample end now with the tokens it has."""
        self.expect_abort()
        if self._rid is not None:
            try:
                await self._link.requests.abort(self._rid)
            except ServerGone:
                self._link.suspect()  # its stream breaks too, and ends the sample
            except ServerRefused as error:  # no reason to lose what it generates
                logger.warning("a sample runs on to its end reason=%s", error)

    async def run(self) -> GeneratedSample:
        """Generate the sample; raises ConfigError for a refused request, RuntimeError when it cannot be finished."""
        start, patience = perf_counter(), Patience()
        while await self._ready():
            num_kept = self._sample.num_kept
            try:
                await self._losable(self._part())
                break
            except (ServerGone, ServerRefused, ProtocolError) as error:
                self._raise_final(error)
                self._link.interrupted(error)
                self._sample.break_off()
                if self._sample.is_complete:
                    break
                delay_s = patience.delay_s(error, self._sample.num_kept > num_kept)
                if delay_s is None:
                    raise RuntimeError(f"{self._name} breaks off again and again: {error}") from error
            await self._unless_aborted(asyncio.sleep(delay_s))
        return self._sample.finished(perf_counter() - start, self._link.draft_version)

    @property
    def _name(self) -> str:
        return f"{self._sample.request.group_id}: sample {self._sample.index}"

    def _raise_final(self, reason: Interruption) -> None:
        """Raise the error of a sample that no further part can finish."""
        if not isinstance(reason, ServerRefused):
            return
        if reason.status in BAD_REQUEST:
            raise ConfigError(
                "request",
                f"SGLang refused it: {reason.message}",
                self._sample.request.group_id,
                "Correct the prompt or sampling.",
            ) from reason
        is_odd = 400 <= reason.status < 500 and reason.status not in BUSY
        if is_odd or (isinstance(reason, Aborted) and reason.status >= 500 and reason.status not in BUSY):
            raise RuntimeError(f"{self._name} cannot be finished: {reason}") from reason

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

    async def _losable(self, part: Coroutine[Any, Any, None]) -> None:
        """Await the part; raises ServerGone when it is lost."""
        self._parting = asyncio.ensure_future(part)
        try:
            await self._parting
        except asyncio.CancelledError:
            if not self._lost:
                self._parting.cancel()
                raise
            raise ServerGone(self._lost) from None
        finally:
            self._parting, self._lost = None, ""

    async def _part(self) -> None:
        """Generate one part to its end; raises an Interruption."""
        request, requests = self._sample.request, self._link.requests
        rid = self._rid = f"{request.group_id}-{self._sample.index}-{uuid4().hex[:8]}"
        body = self._sample.body(rid, self._link.weights_key)
        part: Part = self._sample.part
        self._link.opened(rid)
        try:
            async with aclosing(requests.stream(body)) as chunks:
                async for chunk in chunks:
                    self._link.heard(rid)
                    num_had = len(part.token_ids)
                    part.take(chunk)
                    self._link.brought(rid, len(part.token_ids) - num_had)
                    if self._aborted.is_set() and not part.ended:
                        await self.abort()  # the first abort may have overtaken the request
        except ServerGone:
            if not part.ended:  # the response is whole, even if its stream is not
                raise
        except ProtocolError as error:
            raise ProtocolError(f"{requests.url}: {error}") from error
        finally:
            self._rid = None
            self._link.closed(rid)
        if not part.ended:
            raise ServerGone(f"{requests.url}: the stream ended before the response")
        if part.abort is not None and not self._aborted.is_set():
            status, message = part.abort.get("status_code"), part.abort.get("message")
            raise Aborted(requests.url, status if type(status) is int else 0, str(message))
