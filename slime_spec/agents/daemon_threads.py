"""DaemonThreads run a user's functions in threads that keep no process from ending.

The interpreter waits at its end for every thread of a ThreadPoolExecutor: a function that blocks on its own network
would hold the process of a run that has failed or was stopped.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any


class DaemonThreads(ThreadPoolExecutor):
    """Implements the executor that event loops take, by at most ``max_workers`` daemon threads."""

    def __init__(self, max_workers: int, thread_name_prefix: str) -> None:
        super().__init__(max_workers, thread_name_prefix)  # whose own threads are never started
        self._name, self._most, self._num_started, self._num_open = thread_name_prefix, max_workers, 0, 0
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._counts = threading.Lock()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._counts:
            self._num_open += 1
            if self._num_started < min(self._num_open, self._most):
                self._num_started += 1
                threading.Thread(target=self._work, name=f"{self._name} {self._num_started}", daemon=True).start()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; those that run go on, and nothing waits for them."""
        if cancel_futures:
            with suppress(queue.Empty):
                while (waiting := self._calls.get_nowait()) is not None:
                    waiting[0].cancel()
        with self._counts:
            for _ in range(self._num_started):
                self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, run = call
            if future.set_running_or_notify_cancel():
                try:
                    result = run()
                except BaseException as error:  # noqa: BLE001 - who waits for the future raises it
                    future.set_exception(error)
                else:
                    future.set_result(result)
                del future, run
            del call
            with self._counts:
                self._num_open -= 1
