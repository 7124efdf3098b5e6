"""Break-even lengths by batch: what a round with drafts costs in plain steps, from pairs that were measured in turns.

Where rounds are a server's, nobody can time a pass. But requests that draft and requests that do not, sent in turns at
the same batch, say what a round costs in plain steps: the accept length at which drafting is as fast as not drafting.
A draft that gets better or worse with the policy changes the accept length and leaves this ratio where it is.
"""

from __future__ import annotations

from math import exp, log, log2, sqrt
from typing import NamedTuple

KEEP = 0.9  # weight of a pair against the next pair at the same batch
PRIOR_SD = 0.05  # of the logarithm of one ratio, before pairs show their own scatter
REACH = 1.5  # a batch this many times larger than every measured batch is unknown


class Estimate(NamedTuple):
    """Holds a ratio and what it may be off by, as a share of it (one standard error)."""

    value: float
    relative_error: float


class _Pairs:
    """Sums the logarithms of ratios at one batch, the older the less."""

    def __init__(self) -> None:
        self.count = self._sum = self._squares = 0.0

    def add(self, ratio: float) -> None:
        self.count, self._sum = KEEP * self.count + 1.0, KEEP * self._sum + log(ratio)
        self._squares = KEEP * self._squares + log(ratio) ** 2

    @property
    def mean(self) -> float:
        return self._sum / self.count

    @property
    def error(self) -> float:
        scatter = max(0.0, self._squares - self.count * self.mean**2)
        return sqrt((scatter + PRIOR_SD**2) / self.count / self.count)


class BreakEven:
    """Gives the break-even accept length by batch: a straight line over the batch's logarithm between measured sizes.

    Below the smallest measured batch it is as large as there, which promises too little rather than too much: fewer
    sequences leave more room for drafts. Beyond the largest measured batch it is unknown.

    Example: ``BreakEven().at(8)`` is None; after ``observe(8, 1.7)`` it is ``Estimate(1.7, 0.05)``
    """

    def __init__(self) -> None:
        self._pairs: dict[int, _Pairs] = {}

    def observe(self, num_running: int, ratio: float) -> None:
        """Take in a pair: a round of ``num_running`` sequences took ``ratio`` plain steps."""
        self._pairs.setdefault(num_running, _Pairs()).add(ratio)

    @property
    def batches(self) -> list[int]:
        """Return the measured batches in rising order."""
        return sorted(self._pairs)

    def num_pairs(self, num_running: int) -> float:
        """Return how many pairs count at exactly this batch, old pairs for less than one."""
        return self._pairs[num_running].count if num_running in self._pairs else 0.0

    def at(self, num_running: int) -> Estimate | None:
        known = self.batches
        if not known or num_running > REACH * known[-1]:
            return None
        inside = min(max(num_running, known[0]), known[-1])
        right = next(size for size in known if size >= inside)
        left = max((size for size in known if size <= inside), default=right)
        share = 0.0 if left == right else log2(inside / left) / log2(right / left)
        low, high = self._pairs[left], self._pairs[right]
        error = (1.0 - share) * low.error + share * high.error
        return Estimate(exp((1.0 - share) * low.mean + share * high.mean), error)
