"""RoundMeter measures how long how many sequences ran at once on a server, by when its streams bring tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from time import perf_counter

from slime_spec.speculation.rollout_switch import BatchUse


class RoundMeter:
    """Counts seconds and tokens by the number of running streams; belongs to one asyncio loop.

    A stream runs from its first token, which the prefill brings and which is not counted, until it is closed: a request
    that waits in the server's queue does not run.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._running: set[str] = set()
        self._last: float | None = None
        self._seconds: dict[int, float] = defaultdict(float)
        self._tokens: dict[int, int] = defaultdict(int)

    def brought(self, stream: str, num_tokens: int) -> None:
        """Count what a stream brought."""
        if not num_tokens:
            return
        self._advance()
        if stream in self._running:
            self._tokens[len(self._running)] += num_tokens
        self._running.add(stream)

    def closed(self, stream: str) -> None:
        self._advance()
        self._running.discard(stream)

    def hold(self) -> None:
        """Leave out the time until a stream brings something again: the server is paused."""
        self._advance()
        self._last = None

    def take(self) -> tuple[BatchUse, ...]:
        """Return what was counted since the last call, the largest batch first."""
        self._advance()
        sizes = sorted(self._seconds, reverse=True)
        taken = tuple(BatchUse(size, self._seconds[size], self._tokens[size]) for size in sizes if self._tokens[size])
        self._seconds.clear()
        self._tokens.clear()
        return taken

    def _advance(self) -> None:
        now = self._clock()
        if self._running and self._last is not None:
            self._seconds[len(self._running)] += now - self._last
        self._last = now
