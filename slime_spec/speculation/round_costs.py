"""Round costs predict a round's seconds: timed at start for a few row counts, corrected by every round that runs.

    round   = pass(rows, attended) + draft
    pass    = curve(rows) + attended * each            target, verification and bookkeeping: all but drafting
    draft   = once + steps * step + sequences * steps * row + backlog * token

``rows`` counts the tokens that a round verifies, roots included; ``attended`` sums over those tokens the positions that
they attend to; ``backlog`` counts the tokens that the drafter reads before its first draft.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import exp, log
from typing import NamedTuple

import numpy as np

CLIP = 0.5  # log ratio: a pass that took longer than this was interrupted by something else
COMMON_RATE = 0.05  # how fast all points follow the machine's speed of the moment
OWN_RATE = 0.1  # how fast a point follows the passes near it
NEAR = 1.5  # a pass this many times larger or smaller than every point is a point of its own
DRAFT_DECAY = 0.98
PRIOR_WEIGHT = 0.02  # of the guess about drafting, in rounds


class DraftTimes(NamedTuple):
    """Holds what drafting takes once a round, by step, by sequence and step, and by token read before; see the top."""

    once: float = 0.0
    step: float = 0.0
    row: float = 0.0
    token: float = 0.0

    def of_pass(self, seconds: float) -> DraftTimes:
        """Return the times of shares of a pass that takes ``seconds``."""
        return DraftTimes(*(share * seconds for share in self))


DRAFT_GUESS = DraftTimes(0.02, 0.045, 0.006, 0.004)  # as shares of a pass over one row
FREE = DraftTimes()


class PassCurve:
    """Gives the seconds of a pass by its rows: straight lines between points, the last of them continued."""

    def __init__(self, points: Sequence[tuple[int, float]] = ()) -> None:
        self._rows = sorted(rows for rows, _ in points)
        # A pass over fewer rows takes no more time: what says so was disturbed, which only ever adds to a time.
        least = accumulate((seconds for _, seconds in sorted(points, reverse=True)), min)
        self._seconds = list(least)[::-1]

    @property
    def is_known(self) -> bool:
        return bool(self._rows)

    @property
    def points(self) -> list[tuple[int, float]]:
        return list(zip(self._rows, self._seconds, strict=True))

    def at(self, rows: int) -> float:
        return sum(weight * self._seconds[index] for index, weight in self._weights(rows))

    def observe(self, rows: int, seconds: float) -> float:
        """Correct the curve by one pass; returns the log of measured over predicted."""
        if not self._rows or self._is_far(rows):
            position = bisect_left(self._rows, rows)
            self._rows.insert(position, rows)
            self._seconds.insert(position, seconds)
            return 0.0
        error = log(seconds / self.at(rows))
        clipped = max(-CLIP, min(CLIP, error))
        common = exp(COMMON_RATE * clipped)
        self._seconds = [common * each for each in self._seconds]
        for index, weight in self._weights(rows):
            self._seconds[index] *= exp(OWN_RATE * min(1.0, abs(weight)) * clipped)
        return error

    def _is_far(self, rows: int) -> bool:
        return rows > NEAR * self._rows[-1] or NEAR * rows < self._rows[0]

    def _weights(self, rows: int) -> list[tuple[int, float]]:
        """Return (point, weight) of the line that ``rows`` lies on; below the first point a pass costs as much."""
        known = self._rows
        if len(known) == 1 or rows <= known[0]:
            # One point alone: a pass is free below it, and costs by its rows above.
            return [(0, max(1.0, rows / known[0]))]
        right = min(max(bisect_left(known, rows), 1), len(known) - 1)
        share = (rows - known[right - 1]) / (known[right] - known[right - 1])
        return [(right - 1, 1.0 - share), (right, share)]


class DraftLine:
    """Gives the seconds of drafting as a weighted sum, fitted to recent rounds with less weight the older they are."""

    def __init__(self, guess: DraftTimes) -> None:
        self._guess = np.maximum(guess, 1e-9)  # what is guessed to cost nothing stays there
        self._matrix, self._vector = np.zeros((len(guess), len(guess))), np.zeros(len(guess))
        self._fitted = self._guess

    def at(self, num_sequences: int, steps: float, backlog: int) -> float:
        return float(self._fitted @ (1, steps, num_sequences * steps, backlog))

    def observe(self, num_sequences: int, steps: int, backlog: int, seconds: float) -> None:
        features = np.array((1, steps, num_sequences * steps, backlog)) / seconds  # relative errors count
        self._matrix = DRAFT_DECAY * self._matrix + np.outer(features, features)
        self._vector = DRAFT_DECAY * self._vector + features
        pull = np.diag(PRIOR_WEIGHT / self._guess**2 / len(self._guess))
        fitted = np.linalg.solve(self._matrix + pull, self._vector + pull @ self._guess)
        self._fitted = np.maximum(fitted, 0.05 * self._guess)


class RoundCosts:
    """Predicts seconds of passes and drafts; see the top of this file."""

    def __init__(self, curve: PassCurve, attend_s: float = 0.0, draft_guess: DraftTimes | None = None) -> None:
        """Start from a measured curve; without ``draft_guess`` drafting is a share of the smallest pass."""
        self.curve, self._attend_s = curve, attend_s
        first = curve.points[0][1] if curve.is_known else 1.0
        self._draft = DraftLine(DRAFT_GUESS.of_pass(first) if draft_guess is None else draft_guess)
        self.relative_error = 0.0  # of recent passes, root mean square
        self.knows_drafting = False  # by a measured round; before, what drafts cost is the guess

    def fresh(self) -> RoundCosts:
        """Return costs of the same passes that are corrected apart from these, for another drafter's rounds."""
        return RoundCosts(PassCurve(self.curve.points), self._attend_s)

    def with_free_drafts(self) -> RoundCosts:
        """Return costs of the same passes for drafts that cost nothing, as those found in a text nearly do."""
        return RoundCosts(PassCurve(self.curve.points), self._attend_s, FREE)

    def pass_s(self, rows: int, attended: int) -> float:
        return self.curve.at(rows) + self._attend_s * attended

    def draft_s(self, num_sequences: int, steps: float, backlog: int = 0) -> float:
        return self._draft.at(num_sequences, steps, backlog) if num_sequences else 0.0

    def observe_pass(self, rows: int, attended: int, seconds: float) -> None:
        net = seconds - self._attend_s * attended
        if net <= 0.0:
            return  # a clock too coarse for so small a pass
        error = max(-CLIP, min(CLIP, self.curve.observe(rows, net)))
        self.relative_error = (0.95 * self.relative_error**2 + 0.05 * error**2) ** 0.5

    def observe_draft(self, num_sequences: int, steps: int, backlog: int, seconds: float) -> None:
        if seconds > 0.0:
            self.knows_drafting = True
            self._draft.observe(num_sequences, steps, backlog, seconds)
