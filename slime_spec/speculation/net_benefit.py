"""Net benefit says, over whole rollouts, what rounds took and what plain decoding would have taken for their tokens."""

from __future__ import annotations

from operator import add, sub
from typing import NamedTuple


class NetBenefit(NamedTuple):
    """Sums seconds of rounds, and of the plain steps that would have brought the same tokens at the same batch.

    A round over B sequences that brings T tokens replaces T / B plain steps; what those would have cost in fuller
    batches is corrected when the batch is empty (PlainSchedule). Rounds without drafts are plain steps themselves and
    count the same on both sides, so that ``plain_s / spent_s`` is the speed-up of everything.
    ``error_s`` is what ``plain_s`` may be off by. ``drafted_s`` are the seconds of rounds with drafts alone, and
    ``one_step_s`` those of one plain step for each of them: their ratio is the break-even accept length.

    Example, a round of 30 ms over 2 sequences that brings 5 tokens, where a plain step takes 20 ms:
    ``NetBenefit().with_round(0.03, 2, 5, 0.02, 0.0) == NetBenefit(0.03, 0.05, 0.0, 0.03, 0.02)``
    """

    spent_s: float = 0.0
    plain_s: float = 0.0
    error_s: float = 0.0
    drafted_s: float = 0.0
    one_step_s: float = 0.0

    def with_plain(self, seconds: float) -> NetBenefit:
        """Count a round without drafts."""
        return self._replace(spent_s=self.spent_s + seconds, plain_s=self.plain_s + seconds)

    def with_round(
        self, seconds: float, num_sequences: int, num_tokens: int, step_s: float, relative_error: float
    ) -> NetBenefit:
        """Count a round with drafts that brought ``num_tokens``, where a plain step would take ``step_s``."""
        plain_s = step_s * num_tokens / num_sequences
        return self.plus(NetBenefit(seconds, plain_s, plain_s * relative_error, seconds, step_s))

    def scaled_since(self, earlier: NetBenefit, share: float) -> NetBenefit:
        """Return the same with ``share`` times as much plain decoding for what was counted after ``earlier``."""
        plain_s = earlier.plain_s + share * (self.plain_s - earlier.plain_s)
        return self._replace(plain_s=plain_s, error_s=earlier.error_s + share * (self.error_s - earlier.error_s))

    def plus(self, other: NetBenefit) -> NetBenefit:
        return NetBenefit(*map(add, self, other))

    def since(self, earlier: NetBenefit) -> NetBenefit:
        """Return what was counted after ``earlier``, all of it if the engine counts anew since a restart."""
        return self if earlier.spent_s > self.spent_s else NetBenefit(*map(sub, self, earlier))
