"""A calibration says how likely a draft taken from texts is accepted, by what became of drafts like it.

Drafts are alike when they come from one source, continue a match of one length, and the places of the match agree as
much. Each of these buckets counts the drafts that were judged and those that were accepted, and forgets old ones: under
training, replies grow more alike. Where a bucket has few drafts, the places of the draft at hand are believed instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rollout.embedded.drafters.occurrences import Continuation

KEPT = 1.0 - 1.0 / 256.0  # of a bucket's counts, with every draft that is judged
PRIOR_DRAFTS = 4.0  # what the places say counts as much as this many drafts
MAJORITY = 0.6


class Bucket(NamedTuple):
    """Names drafts that are alike; ``agreement`` is 2 where all places agree, 1 where most do, else 0."""

    source: int
    match_length: int
    agreement: int

    @classmethod
    def of(cls, source: int, match_length: int, found: Continuation) -> Bucket:
        agreement = 2 if found.weight == found.total else int(found.weight >= MAJORITY * found.total)
        return cls(source, match_length, agreement)


class Calibration:
    """Counts, by bucket, what became of the drafts whose parents were accepted."""

    def __init__(self) -> None:
        self._counts: dict[Bucket, tuple[float, float]] = {}  # (judged, accepted)

    def expected(self, bucket: Bucket, found: Continuation) -> float:
        """Return the probability that a draft is accepted, given that its parent was.

        The places alone would say weight / (total + 1): by Laplace's rule, one more place may have gone on otherwise.
        """
        judged, accepted = self._counts.get(bucket, (0.0, 0.0))
        return (accepted + PRIOR_DRAFTS * found.weight / (found.total + 1.0)) / (judged + PRIOR_DRAFTS)

    def note(self, chain: Sequence[Bucket], num_accepted: int) -> None:
        """Count a chain's drafts up to the first that was refused; those after it were not judged."""
        for depth, bucket in enumerate(chain[: num_accepted + 1]):
            judged, accepted = self._counts.get(bucket, (0.0, 0.0))
            self._counts[bucket] = (judged * KEPT + 1.0, accepted * KEPT + float(depth < num_accepted))
