"""Functions of the user's own run on one event loop, in a thread beside the one that waits for the engines.

main thread      engines.generate(feed) ──► arrived ──► a turn's future
                      ▲                                      │
                      └── feed ◄── submit ◄── client ◄───────┘     event loop: a task for each sample
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from slime_spec.agents.daemon_threads import DaemonThreads
from slime_spec.errors import CustomFunctionError
from slime_spec.request_feed import RequestFeed
from slime_spec.types import GeneratedSample, GroupRequest

Result = TypeVar("Result")
NUM_BLOCKING_THREADS = 32  # of asyncio.to_thread: most that asyncio starts itself
END_LIMIT_S = 1.0  # for what calls do when they are cancelled


class Turns:
    """Passes turns' requests to the generation in progress, and its samples to those who wait for them."""

    def __init__(self, feed: RequestFeed) -> None:
        self._feed = feed
        self._waiting: dict[str, Future[GeneratedSample]] = {}

    def submit(self, request: GroupRequest) -> Future[GeneratedSample]:
        """Ask the engines; raises FeedClosed where the step has ended."""
        answer: Future[GeneratedSample] = Future()
        self._waiting[request.group_id] = answer
        self._feed.put(request)
        return answer

    def arrived(self, response: GeneratedSample) -> None:
        """Give a sample to the one who waits for it, if somebody still does."""
        answer = self._waiting.pop(response.group_id, None)
        if answer is not None and answer.set_running_or_notify_cancel():
            answer.set_result(response)

    @property
    def has_waiting(self) -> bool:
        """Return whether the engines owe a turn, be it one that nobody waits for any more."""
        return bool(self._waiting)

    def fail(self, error: Exception) -> None:
        """Raise ``error`` where a turn is waited for; the feed is closed before, so that no other turn can come."""
        waiting, self._waiting = self._waiting, {}  # at once: the first that fails may ask what is waited for
        for answer in list(waiting.values()):
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)


class FunctionThread:
    """Runs coroutines of a user's functions; one that never awaits keeps all others waiting, and is found by check."""

    def __init__(self, name: str, limit_s: float, clock: Callable[[], float]) -> None:
        self._name, self._limit_s, self._clock = name, limit_s, clock
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(DaemonThreads(NUM_BLOCKING_THREADS, "custom functions that block"))
        self._asked_at: float | None = None  # when the loop was asked for a sign of life that it still owes
        self._thread = threading.Thread(target=self._loop.run_forever, name="custom functions", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def check(self) -> None:
        """Raise CustomFunctionError where the loop has ended, or run nothing else for longer than a call may take."""
        if not self._thread.is_alive():
            raise CustomFunctionError(
                f"a task of {self._name} ended the event loop of all samples: let it raise an Exception, and neither "
                "SystemExit nor KeyboardInterrupt"
            )
        now = self._clock()
        if self._asked_at is None:
            self._asked_at = now
            self._loop.call_soon_threadsafe(self._alive)
        elif now - self._asked_at > self._limit_s:
            raise CustomFunctionError(
                f"{self._name} has not awaited anything for {self._limit_s:g} s (--custom-generate-timeout), and all "
                "samples wait for it: run what blocks in asyncio.to_thread"
            )

    def close(self) -> None:
        """End all calls, then the loop; a function that blocks the loop ends with the process."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            self._thread.join(2 * END_LIMIT_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _alive(self) -> None:
        self._asked_at = None

    async def _end(self) -> None:
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls, timeout=END_LIMIT_S)
        self._loop.stop()
