"""The cost probe measures the break-even accept length: a round's cost in plain decode steps of the same batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rollout.embedded.target import Timing


@dataclass
class CostProbe:
    """Times one round in ``interval`` and, right before the round, a plain step that changes nothing; 0 times no round.

    ``round_s`` over ``plain_s`` is how many tokens a round must bring to pay. The plain steps are left out of
    ``timing``, which says what generating takes.
    """

    interval: int
    timing: Timing
    clock: Callable[[], float]
    round_s: float = 0.0
    plain_s: float = 0.0
    _num_rounds: int = 0

    @contextmanager
    def around(self, plain_step: Callable[[], None], is_typical: bool) -> Iterator[None]:
        """Time a round, drafting and observing included; a round that is not typical is neither counted nor timed.

        The first to be timed comes soon, for short runs.
        """
        self._num_rounds += is_typical
        if not (is_typical and self.interval) or self._num_rounds % self.interval != self.interval // 8:
            yield
            return
        if not self.plain_s:
            self._timed(plain_step)  # what a step of one token a row does once, the first time, is not its cost
        self.plain_s += self._timed(plain_step)
        start = self.clock()
        yield
        self.round_s += self.clock() - start

    def _timed(self, plain_step: Callable[[], None]) -> float:
        forward_s, start = self.timing.forward_s, self.clock()
        plain_step()
        seconds = self.clock() - start
        self.timing.forward_s = forward_s
        self.timing.total_s -= seconds
        return seconds
