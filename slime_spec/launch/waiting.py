"""A long wait is told in the log while it lasts, and ends by itself where the waiting code has no limit of its own."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

logger = logging.getLogger(__name__)

TELL_S = 30.0


@contextmanager
def told(what: str, done: str, look: str, every_s: float = TELL_S) -> Iterator[None]:
    """Say what the block waits for, every ``every_s``, and where to look; then that it is done, and how long it took.

    Example: ``told("the engines", "engines ready", "Ray's logs: /tmp/ray/session_latest/logs")``
    """
    start, ended = monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(every_s):
            logger.warning("still waiting for %s seconds=%.0f look in %s", what, monotonic() - start, look)

    teller = threading.Thread(target=tell, name="teller", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
    logger.info("%s seconds=%.1f", done, monotonic() - start)


@contextmanager
def limited(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError out of a block of the main thread that lasts longer, whatever the block waits for.

    Ray passes on only a KeyboardInterrupt of a signal handler.
    """
    is_late = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal is_late
        is_late = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    except KeyboardInterrupt:
        if not is_late:
            raise
        raise TimeoutError(f"no end in {limit_s:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
