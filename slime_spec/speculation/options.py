"""An option is a plan that is weighed: what its round would bring and cost, with the best number of nodes kept."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from slime_spec.speculation.recent_drafts import Numbers, Pool
from slime_spec.speculation.round_costs import RoundCosts

# Numbers of nodes that are tried: every one while few, then four for every doubling.
MOST_COUNTS = (*range(1, 9), *(part << power for power in range(1, 9) for part in (5, 6, 7, 8)))
_NUMBERS = np.array(MOST_COUNTS, float)


@dataclass(frozen=True)
class Option:
    """Holds a plan that was weighed: tokens and seconds of its round, with the best number of ``pool``'s nodes kept."""

    depth: int
    num_drafting: int
    num_kept: int
    tokens: float
    seconds: float
    pool: Pool | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def least_chance(self) -> float:
        """Return the chance of the least likely node that is kept."""
        if self.pool is None:
            return 0.0
        before, after = self.pool.brought(np.array([self.num_kept - 1.0, self.num_kept]), self.num_drafting)
        return float(after - before)


NOTHING = Option(0, 0, 0, 0.0, 1.0)


class Passes:
    """Predicts the passes over so many sequences and some nodes of their drafts, for one plan.

    ``context`` are the tokens that the sequences attend to, all together.
    """

    def __init__(self, costs: RoundCosts, num_sequences: int, context: int) -> None:
        self._costs, self._num_rows, self._context = costs, num_sequences, context
        self._seconds: list[float] = []  # by MOST_COUNTS, as far as was asked for

    def best(self, depth: int, count: int, num_nodes: float, pool: Pool, draft_s: float) -> Option:
        """Return the option of ``count`` sequences that draft, with as many of their nodes kept as bring most."""
        tried = bisect_right(MOST_COUNTS, round(num_nodes))
        if not tried:
            return NOTHING
        while len(self._seconds) < tried:
            self._seconds.append(self.pass_s(MOST_COUNTS[len(self._seconds)]))
        return self._option(depth, count, _NUMBERS[:tried], np.array(self._seconds[:tried]) + draft_s, pool)

    def whole(self, depth: int, count: int, num_nodes: float, pool: Pool, draft_s: float) -> Option:
        """Return the option in which all nodes are kept."""
        kept = np.array([round(num_nodes)], float)
        return self._option(depth, count, kept, np.array([self.pass_s(round(num_nodes)) + draft_s]), pool)

    def _option(self, depth: int, count: int, kept: Numbers, seconds: Numbers, pool: Pool) -> Option:
        tokens: Numbers = self._num_rows + pool.brought(kept, count)
        best = int((tokens / seconds).argmax())
        return Option(depth, count, int(kept[best]), float(tokens[best]), float(seconds[best]), pool)

    def pass_s(self, nodes: int) -> float:
        """Return the seconds of a pass in which ``nodes`` drafted tokens are verified."""
        attended = self._context + self._context * nodes // self._num_rows
        return self._costs.pass_s(self._num_rows + nodes, attended)


def halves(most: int) -> list[int]:
    """Return ``most`` and the powers of two below it."""
    return [1 << power for power in range((most - 1).bit_length())] + [most]


def counts_up_to(most: int) -> list[int]:
    """Return a few numbers from 1 to ``most``, which is one of them."""
    return [count for count in MOST_COUNTS if count < most] + [most] if most else []
