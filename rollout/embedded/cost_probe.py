"""The cost probe times a plain decode step of the running batch now and then, where rounds that draft never say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rollout.embedded.target import Timing


@dataclass
class CostProbe:
    """Times, right before one round in ``interval``, a plain step that changes nothing; 0 times none.

    The plain steps are left out of ``timing``, which says what generating takes.
    """

    interval: int
    timing: Timing
    clock: Callable[[], float]
    cost_clock: Callable[[], float]
    _num_rounds: int = 0
    _is_warm: bool = False

    def step_s(self, plain_step: Callable[[], None]) -> float:
        """Return the cost of a plain step where this round is one to probe, else 0. The first comes soon."""
        self._num_rounds += 1
        if not self.interval or self._num_rounds % self.interval != self.interval // 8:
            return 0.0
        if not self._is_warm:
            self._timed(plain_step)  # what a step of one token a row does once, the first time, is not its cost
            self._is_warm = True
        return self._timed(plain_step)

    def _timed(self, plain_step: Callable[[], None]) -> float:
        forward_s, start, cost_start = self.timing.forward_s, self.clock(), self.cost_clock()
        plain_step()
        self.timing.forward_s = forward_s
        self.timing.total_s -= self.clock() - start
        return self.cost_clock() - cost_start
