"""A draft model's probability of its own token says how likely the token is accepted, once it is calibrated.

Tokens are alike when they stand at one position of a draft and their probabilities fall into one bucket. Each such kind
counts the tokens that were judged and those that were right, and forgets old ones: a policy in training changes. A kind
that was rarely judged is taken to be like its bucket at all positions, and a bucket like what the model itself says.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)  # between buckets: narrow where a row just pays
NUM_POSITIONS = 4  # the last one stands for all after it
KEPT = 1.0 - 1.0 / 128.0  # of a kind's counts, with every token of it that is judged
BUCKET_WEIGHT = 4.0  # tokens that the bucket counts for, beside a kind's own
MODEL_WEIGHT = 8.0  # tokens that the model's word counts for, beside a bucket's own


class ConfidenceCalibration:
    """Turns the probabilities that a draft model gave to its tokens into chances of being accepted."""

    def __init__(self) -> None:
        num_buckets = len(EDGES) + 1
        self._judged = [[0.0] * num_buckets for _ in range(NUM_POSITIONS)]
        self._right = [[0.0] * num_buckets for _ in range(NUM_POSITIONS)]

    def chances(self, confidences: Sequence[float]) -> tuple[float, ...]:
        """Return each token's probability of being accepted, which is what it brings on average, for a chain."""
        return tuple(accumulate((self.expected(*each) for each in enumerate(confidences)), mul))

    def note(self, confidences: Sequence[float], num_right: int) -> None:
        """Count a verified chain's tokens up to the first wrong one: those after it say nothing."""
        for depth, confidence in enumerate(confidences[: num_right + 1]):
            position, bucket = _kind(depth, confidence)
            self._judged[position][bucket] = self._judged[position][bucket] * KEPT + 1.0
            self._right[position][bucket] = self._right[position][bucket] * KEPT + (depth < num_right)

    def expected(self, depth: int, confidence: float) -> float:
        """Return the probability that a token after ``depth`` others is accepted, given that they were."""
        position, bucket = _kind(depth, confidence)
        judged, right = sum(each[bucket] for each in self._judged), sum(each[bucket] for each in self._right)
        common = (right + MODEL_WEIGHT * confidence) / (judged + MODEL_WEIGHT)
        own_judged, own_right = self._judged[position][bucket], self._right[position][bucket]
        return (own_right + BUCKET_WEIGHT * common) / (own_judged + BUCKET_WEIGHT)


@dataclass(frozen=True)
class StopRule:
    """Says when a network's chain is not worth going on with: where it stands with a probability below ``below``.

    What it says of a token before a round began is what it says in the round.
    """

    below: float
    calibration: ConfidenceCalibration


def given_parent(chances: Sequence[float]) -> list[float]:
    """Return a chain's probabilities given that all nodes before were accepted, from those of being accepted at all."""
    before = [1.0, *chances[:-1]]
    return [chance / reached if reached > 0.0 else 0.0 for chance, reached in zip(chances, before, strict=True)]


def _kind(depth: int, confidence: float) -> tuple[int, int]:
    return min(depth, NUM_POSITIONS - 1), bisect_right(EDGES, confidence)
