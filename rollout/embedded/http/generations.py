"""The engine's blocking generations become events on the server's event loop, and can be aborted by request id.

    handler ── events(...) ──► one thread per prompt: engine.generate(), iterate ──┐ samples
                    ▲          engine's own thread: on_progress ───────────────────┤ new tokens
                    └───────────── asyncio.Queue ◄── call_soon_threadsafe ─────────┘

A handler that stops listening (its client is gone, or another prompt failed) aborts what it had started.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from time import monotonic

from rollout.embedded.engine import EmbeddedEngine
from rollout.embedded.http.clients import Busy
from rollout.embedded.logprobs import LogprobRecord
from rollout.embedded.loop_thread import Refused
from rollout.embedded.request import Progress
from slime_spec.errors import ConfigError, GenerationError
from slime_spec.interfaces import Generation
from slime_spec.types import GeneratedSample, GroupRequest

# A prompt under way holds one thread, which sleeps until the engine finishes a sample.
MAX_PROMPTS_IN_FLIGHT = 512


@dataclass(frozen=True)
class NewTokens:
    """Reports tokens that one sample has gained; ``prompt`` is the prompt's index in its call."""

    prompt: int
    progress: Progress


@dataclass(frozen=True)
class Finished:
    """Reports that one sample is complete (or aborted, with the tokens it has)."""

    prompt: int
    sample: GeneratedSample


Event = NewTokens | Finished


class EngineEnded(RuntimeError):
    """Says that the engine was stopped, or that an error ended its loop: the engine will not answer again."""


class Throughput:
    """Counts tokens by the second, and says how many came per second lately; any thread may call it."""

    SPAN_S = 10

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock, self._lock = clock, Lock()
        self._began_s = clock()
        self._counts: dict[int, int] = {}

    def add(self, num_tokens: int) -> None:
        second = int(self._clock())
        with self._lock:
            self._counts[second] = self._counts.get(second, 0) + num_tokens
            for old in [each for each in self._counts if each <= second - self.SPAN_S]:
                del self._counts[old]

    def per_second(self) -> float:
        """Return the tokens of the last ten seconds by the second, or of all the time that there was."""
        now_s = self._clock()
        with self._lock:
            recent = sum(count for second, count in self._counts.items() if second > int(now_s) - self.SPAN_S)
        return recent / min(self.SPAN_S, max(1.0, now_s - self._began_s))


class Handle:
    """Holds a prompt that is or will be generated; it can be aborted any time, also before its thread has started."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._generation: Generation | None = None
        self._aborted = False

    def bind(self, generation: Generation) -> None:
        with self._lock:
            self._generation = generation
            aborted = self._aborted
        if aborted:
            generation.abort()

    def abort(self) -> None:
        with self._lock:
            self._aborted, generation = True, self._generation
        if generation is not None:
            generation.abort()


async def gathered(queue: asyncio.Queue[Event | BaseException]) -> list[Event | BaseException]:
    """Return what has come, a sample's new tokens as one event; waits for the first.

    A reader that is slower than the engine gets fewer and larger events: a stream's chunk holds everything so far, and
    chunk after chunk of a long reply would cost the square of its length. Other handlers have their turn in between.
    """
    await asyncio.sleep(0)
    events: dict[object, Event | BaseException] = {}
    event = await queue.get()
    while True:
        key: object = object()
        if isinstance(event, NewTokens):
            key = event.prompt, event.progress.sample_index
            if isinstance(earlier := events.get(key), NewTokens):
                event = NewTokens(event.prompt, earlier.progress.joined(event.progress))
        events[key] = event
        if queue.empty():
            return list(events.values())
        event = queue.get_nowait()


class Generations:
    """Runs all generations of one engine, at most ``max_samples`` at once; its methods belong to the event loop."""

    def __init__(self, engine: EmbeddedEngine, max_samples: int) -> None:
        self._engine, self.max_samples = engine, max_samples
        self._num_samples = 0  # under way or waiting
        self.throughput = Throughput()
        self._executor = ThreadPoolExecutor(MAX_PROMPTS_IN_FLIGHT, thread_name_prefix="http-generate")
        # A call's own id stands for all its prompts, each prompt's id for itself.
        self._live: dict[str, tuple[Handle, ...]] = {}
        self._jobs: set[Future[None]] = set()

    @property
    def num_prompts(self) -> int:
        """Return the number of prompts under way or waiting."""
        return len(self._jobs)

    async def events(
        self,
        rid: str,
        requests: Sequence[GroupRequest],
        progress: bool = False,
        records: Sequence[LogprobRecord | None] | None = None,
    ) -> AsyncGenerator[Event]:
        """Generate one call's prompts until every sample is finished; ``progress`` asks for tokens as they come.

        ``records`` has each prompt's record, for logprobs that samples do not have.

        Closing the iterator (``contextlib.aclosing``) or cancelling its reader aborts what is unfinished. Raises what
        the engine raised, ConfigError for an id that is in use, and Busy where the queue is full.
        """
        num_samples = sum(len(request.seeds) for request in requests)
        if self._num_samples + num_samples > self.max_samples:
            raise Busy(f"the request queue is full: {self._num_samples} of {self.max_samples} samples are under way")
        handles = tuple(Handle() for _ in requests)
        by_prompt = zip(requests, handles, strict=True)
        names = {**{request.group_id: (handle,) for request, handle in by_prompt}, rid: handles}
        if taken := names.keys() & self._live.keys():
            raise ConfigError("rid", "must not be the id of a request under way", min(taken), "Leave it out.")
        queue: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Event | BaseException) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        jobs = [
            self._executor.submit(self._generate, index, request, handle, put, progress, record)
            for index, (request, handle, record) in enumerate(
                zip(requests, handles, records or [None] * len(requests), strict=True)
            )
        ]
        self._live |= names
        self._jobs.update(jobs)
        self._num_samples += num_samples
        try:
            num_finished = 0
            while num_finished < num_samples:
                for event in await gathered(queue):
                    if isinstance(event, BaseException):
                        raise event
                    num_finished += isinstance(event, Finished)
                    yield event
        finally:
            for job, handle in zip(jobs, handles, strict=True):
                if not job.cancel() and not job.done():
                    handle.abort()
            self._num_samples -= num_samples
            self._jobs.difference_update(jobs)
            for name in names:
                del self._live[name]

    def abort(self, rid: str) -> bool:
        """Finish the request of this id with the tokens it has; False when no request has the id."""
        for handle in self._live.get(rid, ()):
            handle.abort()
        return rid in self._live

    async def abort_all(self) -> None:
        """Abort everything under way, and wait until the engine has let go of it."""
        jobs = list(self._jobs)
        for handles in self._live.values():
            for handle in handles:
                handle.abort()
        # Not by awaiting the jobs: a caller that is cancelled would cancel those that have not started.
        await asyncio.to_thread(wait, jobs)

    def close(self) -> None:
        """Wait for the threads; the engine must have been stopped or be idle."""
        self._executor.shutdown()

    def _generate(
        self,
        prompt: int,
        request: GroupRequest,
        handle: Handle,
        put: Callable[[Event | BaseException], None],
        progress: bool,
        record: LogprobRecord | None,
    ) -> None:
        """Generate the samples of one prompt on a thread of its own."""

        def on_progress(gained: Progress) -> None:
            self.throughput.add(len(gained.token_ids))
            if progress:
                put(NewTokens(prompt, gained))

        try:
            generation = self._engine.generate(request, on_progress, record)
            handle.bind(generation)
            for sample in generation:
                put(Finished(prompt, sample))
        except (Refused, GenerationError) as error:
            put(error)
        except RuntimeError as error:
            put(EngineEnded(str(error)))
        except Exception as error:  # noqa: BLE001 - raised again by the reader of the events, whose error it is
            put(error)
