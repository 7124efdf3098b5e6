"""The cost model gives a round's time by batch size, fitted to measured passes, and where speculation pays.

    t_verify(B, k) = weights + B (sequence + k token)      a pass over k tokens of each of B sequences
    t_target(B)    = t_verify(B, 1)                        a plain decode step
    t_draft(B, S)  = S (step + B row)                      a draft of S steps for each of B sequences
    t_outside(B)   = round + B each                        scheduling, sampling, verification; less for a plain step

    break-even accept length = (t_verify(B, S + 1) + t_draft(B, S) + t_outside(B)) / (t_target(B) + t_plain_outside(B))

Speculation wins where a round yields more tokens than that. All fits are least squares on relative errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch


@dataclass(frozen=True)
class Pass:
    """Holds one measurement: seconds of a pass over ``num_tokens`` tokens of each of ``batch_size`` sequences.

    For a draft ``num_tokens`` is the number of steps.
    """

    batch_size: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """Gives seconds as ``fixed + batch_size * each``."""

    fixed: float = 0.0
    each: float = 0.0

    def at(self, batch_size: int) -> float:
        return self.fixed + batch_size * self.each


@dataclass(frozen=True)
class CostModel:
    """Holds the coefficients above, in seconds, and the largest relative errors of the fits over their measurements."""

    weights: float
    sequence: float
    token: float
    draft_step: Line = Line()
    outside: Line = Line()
    plain_outside: Line = Line()
    verify_error: float = 0.0
    draft_error: float = 0.0

    def verify_s(self, batch_size: int, num_tokens: int) -> float:
        return self.weights + batch_size * (self.sequence + num_tokens * self.token)

    def break_even_length(self, batch_size: int, num_steps: int) -> float:
        """Return the tokens that a sequence must gain per round of a chain of ``num_steps`` drafts."""
        drafting = num_steps * self.draft_step.at(batch_size)
        a_round = self.verify_s(batch_size, num_steps + 1) + drafting + self.outside.at(batch_size)
        return a_round / (self.verify_s(batch_size, 1) + self.plain_outside.at(batch_size))

    def speed_up(self, batch_size: int, num_steps: int, accept_length: float) -> float:
        return accept_length / self.break_even_length(batch_size, num_steps)

    def loses_from(self, num_steps: int, accept_length: float, largest: int) -> int | None:
        """Return the smallest batch at which this chain is slower than plain decoding; None up to ``largest``."""
        sizes = range(1, largest + 1)
        return next((size for size in sizes if self.speed_up(size, num_steps, accept_length) < 1.0), None)


def fit(
    passes: Sequence[Pass],
    drafts: Sequence[Pass] = (),
    outside: Sequence[Pass] = (),
    plain_outside: Sequence[Pass] = (),
) -> CostModel:
    """Fit the model to the measurements; a part that was not measured costs nothing."""
    verify, verify_error = _fitted(
        [(1.0, each.batch_size, each.batch_size * each.num_tokens) for each in passes], passes
    )
    step, draft_error = _line(drafts)
    return CostModel(
        weights=verify[0],
        sequence=verify[1],
        token=verify[2],
        draft_step=step,
        outside=_line(outside)[0],
        plain_outside=_line(plain_outside)[0],
        verify_error=verify_error,
        draft_error=draft_error,
    )


def _line(measured: Sequence[Pass]) -> tuple[Line, float]:
    """Fit seconds per step as a line over batch sizes."""
    if not measured:
        return Line(), 0.0
    features = [(float(each.num_tokens), float(each.num_tokens * each.batch_size)) for each in measured]
    (fixed, each), error = _fitted(features, measured)
    return Line(fixed, each), error


def _fitted(features: Sequence[tuple[float, ...]], measured: Sequence[Pass]) -> tuple[list[float], float]:
    """Return non-negative coefficients of least squared relative error, and the largest relative error.

    There are few coefficients, so every choice of zero coefficients is tried.
    """
    seconds = torch.tensor([each.seconds for each in measured], dtype=torch.float64)
    matrix = torch.tensor(features, dtype=torch.float64) / seconds.unsqueeze(1)
    ones, width = torch.ones_like(seconds), matrix.shape[1]
    best, least = torch.zeros(width, dtype=torch.float64), float("inf")
    for count in range(1, width + 1):
        for used in combinations(range(width), count):
            solved = torch.linalg.lstsq(matrix[:, used], ones.unsqueeze(1)).solution.squeeze(1)
            residual = float((matrix[:, used] @ solved - ones).square().sum())
            if residual < least and bool((solved >= 0).all()):
                least, best = residual, torch.zeros(width, dtype=torch.float64)
                best[list(used)] = solved
    return best.tolist(), float((matrix @ best - ones).abs().max())
