"""A RequestFeed gives a generation requests while it runs: those of later turns, and of prompts that replace others.

any thread ──put──► RequestFeed ──taken──► the coordinator, at each wait     close: nothing more comes
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from slime_spec.types import GroupRequest


class FeedClosed(RuntimeError):
    """A request comes too late: the step that it belongs to has ended."""


class RequestFeed:
    """Passes requests from any thread to the one generation that takes them. ``check`` is called at each taking.

    What ``check`` raises, and what ``fail`` was given, ends the generation.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self._requests: queue.SimpleQueue[GroupRequest] = queue.SimpleQueue()
        self._is_closed = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # of a put and a close

    @property
    def has_more(self) -> bool:
        """Return whether a request waits here, or may still come."""
        return not (self._is_closed and self._requests.empty())

    def put(self, request: GroupRequest) -> None:
        """Hand over a request; raises FeedClosed where nobody takes it any more."""
        with self._lock:
            if self._is_closed:
                raise FeedClosed(f"{request.group_id}: the step has ended")
            self._requests.put(request)

    def taken(self) -> list[GroupRequest]:
        """Return the requests that have come since the last call."""
        self._check()
        if self._error is not None:
            raise self._error
        requests = []
        while not self._requests.empty():
            requests.append(self._requests.get_nowait())
        return requests

    def fail(self, error: BaseException) -> None:
        """Have the generation raise an error that its own thread does not see; the first of several."""
        self._error = self._error or error

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
