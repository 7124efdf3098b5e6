"""The loop thread alone touches the core; other threads send it commands.

callers ── submit(command) ──► inbox ──► loop: run commands, then core.step() while there is work
                 │                         │
              Future ◄─────────────────────┘   an error in the loop or in a command fails every future and every
                                               listener; only Refused is its caller's alone
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, TypeVar

from rollout.embedded.core import GenerationCore

T = TypeVar("T")
Command = tuple[Callable[[], Any], Future]


class LoopEnded(RuntimeError):
    """Says that the loop has ended, stopped or by an error: the engine will never answer again."""


class LoopStopped(LoopEnded):
    """Says that the engine was stopped."""


class Refused(RuntimeError):
    """Says that the engine refuses a command in its present state; the engine has changed nothing and goes on."""


class LoopThread:
    """Runs a GenerationCore; ``on_end`` is called once, with the error that ended the loop (LoopStopped if none)."""

    def __init__(self, core: GenerationCore, on_end: Callable[[BaseException], None]) -> None:
        self._core, self._on_end = core, on_end
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._in_hand: Future | None = None
        self._lock = Lock()
        self._ended: BaseException | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded-engine")
        self._executor.submit(self._loop).add_done_callback(self._end)

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Run ``command`` on the loop's thread between two rounds; fails at once when the loop has ended."""
        future: Future[T] = Future()
        with self._lock:
            if self._ended is not None:
                raise LoopEnded("the engine is not running") from self._ended
            self._inbox.put((command, future))
        return future

    def call(self, command: Callable[[], T]) -> T:
        return self.submit(command).result()

    def stop(self) -> None:
        """End the loop after the round in progress and wait for it."""
        self._inbox.put(None)
        self._executor.shutdown(wait=True)

    def _loop(self) -> None:
        while self._run_commands():
            if self._core.can_step:
                self._core.step()

    def _run_commands(self) -> bool:
        """Run the commands of the inbox, waiting for one when the core is idle; False when the loop shall stop."""
        block = not self._core.can_step
        while True:
            try:
                item = self._inbox.get(block=block)
            except Empty:
                return True
            if item is None:
                return False
            command, self._in_hand = item
            _run(command, self._in_hand)
            block = False

    def _end(self, finished: Future[None]) -> None:
        error = finished.exception() or LoopStopped("the engine was stopped")
        with self._lock:
            self._ended = error
        # The command that ended the loop, if one did; and those behind it, for nothing is added from here on.
        if self._in_hand is not None and not self._in_hand.done():
            self._in_hand.set_exception(error)
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is not None:
                item[1].set_exception(error)
        self._on_end(error)


def _run(command: Callable[[], Any], future: Future) -> None:
    """Run a command, which may raise Refused; any other error (torch's are RuntimeErrors too) ends the loop."""
    try:
        future.set_result(command())
    except Refused as error:
        future.set_exception(error)
