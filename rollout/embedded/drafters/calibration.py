"""A calibration says how likely a draft taken from texts is accepted, by what became of drafts like it.

Drafts are alike when they come from one source, continue a match of one length, and the places of the match agree as
much. Each of these buckets counts the drafts that were judged and those that were right, and forgets old ones: under
training, replies grow more alike. Where a bucket has few drafts, the places of the draft at hand are believed instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout.embedded.drafters.occurrences import LONGEST_MATCH, Continuation

KEPT = 1.0 - 1.0 / 256.0  # of a bucket's counts, with every draft that is judged
PRIOR_DRAFTS = 4.0  # what the places say counts as much as this many drafts
MAJORITY = 0.6
NUM_AGREEMENTS = 3  # all places, most of them (MAJORITY), fewer


def bucket_of(source: int, match_length: int, found: Continuation) -> int:
    """Return the number of the drafts that are alike, by source (0 ..), match length and agreement of the places."""
    _, weight, total = found
    agreement = 2 if weight == total else int(weight >= MAJORITY * total)
    return (source * (LONGEST_MATCH + 1) + match_length) * NUM_AGREEMENTS + agreement


class Calibration:
    """Counts, by bucket, what became of the drafts whose parents were right."""

    def __init__(self, num_sources: int) -> None:
        num_buckets = num_sources * (LONGEST_MATCH + 1) * NUM_AGREEMENTS
        self._judged, self._right = [0.0] * num_buckets, [0.0] * num_buckets

    def expected(self, bucket: int, found: Continuation) -> float:
        """Return the probability that a draft is accepted, given that its parent was.

        The places alone would say weight / (total + 1): by Laplace's rule, one more place may have gone on otherwise.
        """
        _, weight, total = found
        return (self._right[bucket] + PRIOR_DRAFTS * weight / (total + 1.0)) / (self._judged[bucket] + PRIOR_DRAFTS)

    def note(self, chain: Sequence[int], num_right: int) -> None:
        """Count a chain's drafts, given by their buckets, up to the first wrong one: those after it say nothing."""
        judged, right = self._judged, self._right
        for depth, bucket in enumerate(chain[: num_right + 1]):
            judged[bucket] = judged[bucket] * KEPT + 1.0
            right[bucket] = right[bucket] * KEPT + (depth < num_right)
