"""Running acceptance says how likely each node of a draft is to be accepted, from recent rounds."""

from __future__ import annotations

from collections.abc import Collection, Sequence

WINDOW = 64  # observations of a node that count; acceptance follows a policy that changes within a run
PRIOR = 0.6  # acceptance before anything was seen
PRIOR_WEIGHT = 8.0  # observations that the prior counts for
COMMON_WEIGHT = 4.0  # observations of a node that what all nodes have in common counts for


class RunningAcceptance:
    """Keeps, by a node's number in its draft, how often it was accepted when its parent was.

    A node whose parent was refused says nothing, so it is not counted: for a chain these are the rates given that all
    drafts before stood. Each observation of a node weighs ``1 - 1 / WINDOW`` times as much as the next one. A node that
    was rarely reached is taken to be like all others, or depths that were never drafted would never seem worth it.
    """

    def __init__(self, num_nodes: int) -> None:
        self._tried = [0.0] * num_nodes
        self._accepted = [0.0] * num_nodes
        self.num_observed = 0

    @property
    def num_nodes(self) -> int:
        return len(self._tried)

    def observe(self, parents: Sequence[int], path: Collection[int]) -> None:
        """Count one verified draft: ``parents`` as in a draft (-1 is the root), ``path`` its accepted nodes."""
        keep = 1.0 - 1.0 / WINDOW
        for node, parent in enumerate(parents):
            if parent < 0 or parent in path:
                self._tried[node] = keep * self._tried[node] + 1.0
                self._accepted[node] = keep * self._accepted[node] + (node in path)
        self.num_observed += 1

    def expect(self, given_parent: Sequence[float]) -> None:
        """Count one chain of which only the probability of each node, given its parent, is known."""
        keep, reached = 1.0 - 1.0 / WINDOW, 1.0
        for node, rate in enumerate(given_parent):
            self._tried[node] = self._tried[node] * (1.0 - (1.0 - keep) * reached) + reached
            self._accepted[node] = self._accepted[node] * (1.0 - (1.0 - keep) * reached) + reached * rate
            reached *= rate

    def rate(self, node: int) -> float:
        """Return the rate of a node given its parent."""
        return self._rate(node, self._common())

    def rates(self, depth: int) -> list[float]:
        """Return ``rate`` of a chain's nodes."""
        common = self._common()
        return [self._rate(node, common) for node in range(depth)]

    def _rate(self, node: int, common: float) -> float:
        return (self._accepted[node] + COMMON_WEIGHT * common) / (self._tried[node] + COMMON_WEIGHT)

    def _common(self) -> float:
        """Return the rate of all nodes together."""
        return (sum(self._accepted) + PRIOR * PRIOR_WEIGHT) / (sum(self._tried) + PRIOR_WEIGHT)

    def chances(self, parents: Sequence[int]) -> list[float]:
        """Return each node's probability of being accepted, which is the number of tokens it brings on average."""
        chances: list[float] = []
        common = self._common()
        for node, parent in enumerate(parents):
            chances.append(self._rate(node, common) * (chances[parent] if parent >= 0 else 1.0))
        return chances

    def chain(self, depth: int) -> list[float]:
        """Return ``chances`` of a chain."""
        return self.chances(range(-1, depth - 1))
