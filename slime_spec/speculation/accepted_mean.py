"""AcceptedMean remembers how many drafts a round accepted, and judges each new count by it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from slime_spec.types import SpecCounters

logger = logging.getLogger(__name__)

MEMORY = 0.7  # weight of the past in the running mean


@dataclass
class AcceptedMean:
    """Holds the running mean of accepted drafts per round, in which only good counts take part.

    ``drop`` is the share of the mean below which the draft is taken for lost.
    """

    drop: float
    mean: float | None = None

    def judge(self, counted: SpecCounters) -> bool:
        """Return whether as many drafts per round are accepted as before; it is True where no round was verified."""
        if not counted.num_rounds:
            return True
        accepted = counted.num_correct / counted.num_rounds
        if self.mean is not None and accepted < self.drop * self.mean:
            logger.error("ALARM drafts are refused accepted_per_round=%.3f mean=%.3f", accepted, self.mean)
            return False
        self.mean = accepted if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * accepted
        logger.info("canary accepted_per_round=%.3f mean=%.3f", accepted, self.mean)
        return True
