"""Calibration times a handful of passes over scratch rows, before the first request, for the costs of rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rollout.embedded.kv_cache import KvCache
from rollout.embedded.plan import RowSpan
from rollout.embedded.target import Target
from slime_spec.speculation.round_costs import PassCurve, RoundCosts

ROW_COUNTS = (1, 4, 8, 12, 16, 32, 64, 128)
MOST_SECONDS = 1.5  # what larger row counts cost is continued from the smaller ones
NUM_TIMES = 2
SMALL_ROWS = 16  # passes over more rows are timed once: they last longer than most disturbances
LONG_CONTEXT = 256


def calibrate(
    target: Target, caches: Sequence[KvCache], max_running: int, max_positions: int, clock: Callable[[], float]
) -> RoundCosts:
    """Return the costs of passes of ``target``; the caches (the drafter's follows the target's) hold no sequence.

    ``max_positions`` is the longest context. Takes about MOST_SECONDS at most, or the time of one pass.
    """
    probe = _Passes(target, caches, max_running, max_positions, clock)
    probe.seconds(1, 0)  # what the first pass does once is not its cost
    points: list[tuple[int, float]] = []
    start = clock()
    for rows in ROW_COUNTS:
        if probe.fits(rows, 0) and (not points or clock() - start < MOST_SECONDS):
            points.append((rows, min(probe.seconds(rows, 0) for _ in range(NUM_TIMES if rows <= SMALL_ROWS else 1))))
    attend_s = 0.0
    rows = max(rows for rows, _ in points[:3])
    if probe.fits(rows, LONG_CONTEXT) and clock() - start < MOST_SECONDS:
        near, far = (min(probe.seconds(rows, context) for _ in range(NUM_TIMES)) for context in (0, LONG_CONTEXT))
        attend_s = max(0.0, far - near) / (rows * LONG_CONTEXT)
    probe.end()
    return RoundCosts(PassCurve(points), attend_s)


class _Passes:
    """Runs passes over rows that no sequence owns."""

    def __init__(
        self,
        target: Target,
        caches: Sequence[KvCache],
        max_running: int,
        max_positions: int,
        clock: Callable[[], float],
    ) -> None:
        self._target, self._caches, self._clock = target, caches, clock
        self._max_running, self._max_positions = max_running, max_positions

    def _shape(self, rows: int) -> tuple[int, int]:
        """Return how many sequences have how many tokens each, together about ``rows``."""
        sequences = min(rows, self._max_running)
        return sequences, rows // sequences

    def fits(self, rows: int, context: int) -> bool:
        sequences, count = self._shape(rows)
        needed = (sequences, context + count)
        return needed[1] <= self._max_positions and self._caches[0].fits(needed, (0, 0))

    def seconds(self, rows: int, context: int) -> float:
        """Return the time of one pass of so many rows, after ``context`` positions."""
        sequences, count = self._shape(rows)
        target, (cache, *followers) = self._target, self._caches
        cache.reserve((sequences, context + count), (0, 0))
        for follower in followers:
            follower.follow(cache)
        spans = [RowSpan(row, context, count) for row in range(sequences)]
        start = self._clock()
        output = target.run(cache.own, spans, [0] * (sequences * count))
        target.logits(output.hidden)[:1, :1].cpu()  # waits for a device
        return self._clock() - start

    def end(self) -> None:
        """Give the scratch rows back."""
        for cache in self._caches:
            cache.release()
