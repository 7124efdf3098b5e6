"""The tokens that a reply will still have are estimated from the replies that ended lately."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque

KEPT = 256  # replies
ENOUGH = 4  # longer replies, to say what is usual


class RemainingTokens:
    """Estimates the mean residual length: of the replies that were longer, how many tokens they had left."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def observe(self, length: int) -> None:
        """Note the length of a reply that ended."""
        if len(self._recent) == KEPT:
            self._sorted.pop(bisect_right(self._sorted, self._recent.popleft()) - 1)
        self._recent.append(length)
        insort(self._sorted, length)

    def expected(self, length: int, most: int) -> float:
        """Return the tokens that a reply of ``length`` will probably still have, at most ``most``.

        Where few were as long, it is as many as there are: of lengths that spread over decades this is usual.
        """
        longer = self._sorted[bisect_right(self._sorted, length) :]
        left = sum(longer) / len(longer) - length if len(longer) >= ENOUGH else max(float(length), 16.0)
        return min(left, float(most))
