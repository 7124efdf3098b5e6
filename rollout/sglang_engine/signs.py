"""Signs says when a server must be asked whether it still lives, because nothing has come from it for too long.

a stream begins, brings a chunk, ends ──► Signs ◄── the server answered a question
                                            │ is_silent
                                       Supervisor asks
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Signs:
    """Notes each open stream's last chunk, and the server's last answer; called from several threads.

    A server is silent when a stream has brought nothing for ``limit_s``, or without streams the server itself has said
    nothing for as long. Until a server has generated its first token the limit is ``first_limit_s``: kernels are
    compiled then.
    """

    def __init__(self, limit_s: float, first_limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self._first_limit_s, self._clock = limit_s, max(limit_s, first_limit_s), clock
        self._lock = threading.Lock()
        self._streams: dict[str, float] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Begin with a new server."""
        with self._lock:
            self._answered, self._has_generated = self._clock(), False

    def opened(self, stream: str) -> None:
        with self._lock:
            self._streams[stream] = self._clock()

    def heard(self, stream: str) -> None:
        """Note a chunk; of a stream that was not opened here (behind a router) it says that servers generate."""
        with self._lock:
            self._has_generated = True
            if stream in self._streams:
                self._streams[stream] = self._clock()

    def closed(self, stream: str) -> None:
        with self._lock:
            self._streams.pop(stream, None)

    def answered(self) -> None:
        """Note that the server answered a question that its scheduler must answer."""
        with self._lock:
            self._answered = self._clock()

    @property
    def is_silent(self) -> bool:
        """Return whether the server must be asked."""
        with self._lock:
            last = max(self._answered, min(self._streams.values(), default=self._answered))
            return self._clock() - last > (self.limit_s if self._has_generated else self._first_limit_s)
