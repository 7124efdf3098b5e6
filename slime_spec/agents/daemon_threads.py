"""DaemonThreads run a user's functions in threads that keep no process from ending.

The interpreter waits at its end for every thread of a ThreadPoolExecutor: a function that blocks on its own network
would hold the process of a run that has failed or was stopped.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

logger = logging.getLogger(__name__)

Call = tuple[Future[Any], Callable[[], Any]]


class DaemonThreads(ThreadPoolExecutor):
    """Implements the executor that event loops take, by at most ``max_workers`` daemon threads."""

    def __init__(self, max_workers: int, thread_name_prefix: str) -> None:
        super().__init__(max_workers, thread_name_prefix)  # whose own threads are never started
        self._name, self._most, self._num_started, self._num_open = thread_name_prefix, max_workers, 0, 0
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._is_closed = False
        self._lock = threading.Lock()  # of the counts, and of a submission and a shutdown

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the function in a thread; raises RuntimeError after a shutdown, as other executors do."""
        future: Future[Any] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError(f"{self._name}: no call is taken after the shutdown")
            if self._num_started < min(self._num_open + 1, self._most):
                threading.Thread(target=self._work, name=f"{self._name} {self._num_started + 1}", daemon=True).start()
                self._num_started += 1
            self._num_open += 1
            self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; those that run go on, and nothing waits for them."""
        cancelled: list[Call] = []
        with self._lock:
            self._is_closed = True
            if cancel_futures:
                with suppress(queue.Empty):
                    while (waiting := self._calls.get_nowait()) is not None:
                        cancelled.append(waiting)
            for _ in range(self._num_started):
                self._calls.put(None)
        for future, _ in cancelled:
            future.cancel()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                _run(*call)
            except BaseException:  # of a callback of the future: other calls still need this thread
                logger.exception("what was to follow a call failed threads=%s", self._name)
            finally:
                del call  # not kept while the thread waits for the next
                with self._lock:
                    self._num_open -= 1


def _run(future: Future[Any], run: Callable[[], Any]) -> None:
    """Make the call, unless it was cancelled meanwhile, and note what it gives or raises."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = run()
    except BaseException as error:  # noqa: BLE001 - who waits for the future raises it
        future.set_exception(error)
    else:
        future.set_result(result)
