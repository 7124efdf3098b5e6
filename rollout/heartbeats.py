"""Heartbeats notice engines whose process hangs, and end it: what waits for it then fails as it does of a dead one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Protocol

logger = logging.getLogger(__name__)


class Pings(Protocol):
    """Asks engines whether they live, without waiting."""

    def ping(self, engine: int) -> Hashable:
        """Ask an engine, and return the call."""

    def answered(self, call: Hashable) -> bool:
        """Return whether a call has ended, however it did: who waits for a dead engine hears of it elsewhere."""

    def end(self, engine: int) -> None:
        """End an engine's process."""


@dataclass
class _Pulse:
    """Records what one engine was asked: the call not yet answered, since when, and how long it may take.

    ``ends_at_s`` is when its process is ended although it answers: it has not started by then.
    """

    limit_s: float
    ends_at_s: float = inf
    call: Hashable | None = None
    since_s: float = 0.0


class Heartbeats:
    """Asks every expected engine, one question at a time, every ``interval_s``, from a thread of its own."""

    def __init__(self, pings: Pings, interval_s: float, now: Callable[[], float] = monotonic) -> None:
        self._pings, self._interval_s, self._now = pings, interval_s, now
        self._pulses: dict[int, _Pulse] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def expect(self, engine: int, limit_s: float) -> None:
        """From now on an engine's process must answer within ``limit_s``; what it was asked before is forgotten."""
        with self._lock:
            self._pulses[engine] = _Pulse(limit_s)

    def expect_start(self, engine: int, limit_s: float) -> None:
        """From now on an engine's process must answer, and be expected as one that has started, within ``limit_s``."""
        with self._lock:
            self._pulses[engine] = _Pulse(limit_s, self._now() + limit_s)

    def forget(self, engine: int) -> None:
        """Expect nothing of an engine any more."""
        with self._lock:
            self._pulses.pop(engine, None)

    def beat(self) -> None:
        """Look at every engine once: ask those that owe no answer, and end those that owe one for too long."""
        with self._lock:
            for engine, pulse in list(self._pulses.items()):
                now = self._now()
                if pulse.call is None or self._pings.answered(pulse.call):
                    pulse.call, pulse.since_s = self._pings.ping(engine), now
                if now - pulse.since_s > pulse.limit_s or now > pulse.ends_at_s:
                    why = "does not answer" if now <= pulse.ends_at_s else "does not start"
                    logger.error("engine %s, its process is ended engine=%d after_s=%.0f", why, engine, pulse.limit_s)
                    del self._pulses[engine]
                    self._pings.end(engine)

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self.beat()
            except Exception:  # a call that Ray refuses once must not end the watch over the others
                logger.exception("engines were not asked whether they live")
