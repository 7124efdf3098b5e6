"""StopSignals turns SIGTERM, SIGHUP and Ctrl-C into an orderly end: the run saves, then stops what it started.

A signal interrupts what may be interrupted (the start, a rollout); a training step, a push, the writing of a file and
the clean-up are finished first. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TWICE_S = 1.0  # `timeout` and some schedulers send one request twice: to the process, and to its group
CLEAN_UP_S = 30.0
SHELL_BASE = 128  # a shell reports a process that a signal ended as 128 + its number


class StopSignals:
    """Remembers the first signal; the arguments are for tests.

    Example::

        with StopSignals() as stop:
            with stop.interruptible():
                engines.start()  # raises KeyboardInterrupt on a signal
            while not stop.asked:
                train()  # is finished first
    """

    def __init__(
        self,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        clean_up_s: float = CLEAN_UP_S,
    ) -> None:
        self.asked: signal.Signals | None = None
        self._end, self._clock = end, clock
        self._asked_at = 0.0
        self._may_interrupt = False
        self._before: dict[signal.Signals, object] = {}
        self._clean_up_s = clean_up_s
        self._limit: threading.Timer | None = None

    @property
    def exit_code(self) -> int:
        """Return the process's exit code: 130 after Ctrl-C, 143 after SIGTERM, 0 without a signal."""
        return SHELL_BASE + self.asked if self.asked else 0

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal raise KeyboardInterrupt within the block, at once where it has come already.

        KeyboardInterrupt, because Ray passes on no other exception of a signal handler, and because code that catches
        Exception does not take it for an error of its own.
        """
        try:
            self._may_interrupt = True
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._may_interrupt = False

    @contextmanager
    def limited_clean_up(self) -> Iterator[None]:
        """Give the clean-up after the block 30 s, if a signal has come: all that must be kept is on disk then.

        Ray, for one, waits a minute for a head that the same signal has ended. Of nested blocks, the first to
        end counts.
        """
        try:
            yield
        finally:
            if self.asked and self._limit is None:
                self._limit = threading.Timer(self._clean_up_s, self._end, [self.exit_code])
                self._limit.daemon = True
                self._limit.start()

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal. Writes past Python's streams and logs, in the middle of whose work a signal may come."""
        now = self._clock()
        if self.asked is None:
            self.asked, self._asked_at = signal.Signals(number), now
            _tell(f"\n{self.asked.name}: stopping in order; a second signal ends the run at once\n")
            if self._may_interrupt:
                raise KeyboardInterrupt
        elif now - self._asked_at >= TWICE_S:
            _tell("\nended at once\n")
            self._end(SHELL_BASE + number)

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # nohup, or a shell's `&`: the run shall outlive such a signal
                self._before[number] = before
                signal.signal(number, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit is not None:
            self._limit.cancel()
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]


def _tell(text: str) -> None:
    os.write(2, text.encode())
