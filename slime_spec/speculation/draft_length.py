"""Draft lengths are chosen by formula: from acceptance by position, and from what a round costs.

    tokens(d)    = 1 + r1 + r1 r2 + ... + r1 ... rd           a sequence's tokens in a round of d drafts
    RTP-LLM      : argmax_d tokens(d) / (1 + c d)              a verify pass counted as one plain step
    by costs     : argmax_d tokens(d) / break_even(d)          what RoundCosts measured, whatever the batch

``rates`` are acceptance by position, each given the positions before it. RTP-LLM's guide ("the optimal
gen_num_per_cycle can be calculated" of the draft's and the target's times and the acceptance) is Leviathan et al.'s
speed-up (arXiv 2211.17192, theorem 3.8) with rates by position; it holds while a pass is bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from slime_spec.speculation.cost_table import break_even_length
from slime_spec.speculation.round_costs import RoundCosts

HALVINGS = 60  # of the interval in which a rate is searched: all bits of a double


def tokens_of(rates: Sequence[float], depth: int) -> float:
    """Return the mean tokens of a round of ``depth`` drafts; ``tokens_of((0.5, 0.5), 2) == 1.75``."""
    return 1.0 + sum(accumulate(rates[:depth], mul))


def length_by_step_share(rates: Sequence[float], step_share: float) -> int:
    """Return RTP-LLM's length for a draft step that takes ``step_share`` of a plain step; 0 where none gains."""
    speeds = [tokens_of(rates, depth) / (1.0 + step_share * depth) for depth in range(len(rates) + 1)]
    return max(range(len(speeds)), key=speeds.__getitem__)


def speed_up(costs: RoundCosts, rates: Sequence[float], batch: int, context: int, depth: int) -> float:
    """Return tokens per second of rounds of ``depth`` drafts over those of plain steps."""
    return tokens_of(rates, depth) / break_even_length(costs, batch, context, depth) if depth else 1.0


def length_by_costs(costs: RoundCosts, rates: Sequence[float], batch: int, context: int) -> tuple[int, float]:
    """Return the length of most tokens per second, 0 where plain steps are fastest, and its speed-up."""
    speeds = [speed_up(costs, rates, batch, context, depth) for depth in range(len(rates) + 1)]
    best = max(range(len(speeds)), key=speeds.__getitem__)
    return best, speeds[best]


def rate_of_length(accept_length: float, depth: int) -> float:
    """Return the rate, the same at every position, at which chains of ``depth`` drafts bring so many tokens a round.

    ``accept_length`` is from 1 to depth + 1, the bonus token included. Example: ``rate_of_length(1.75, 2) == 0.5``
    """
    assert 1.0 <= accept_length <= depth + 1, "the caller has checked"
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_of([middle] * depth, depth) < accept_length else (low, middle)
    return (low + high) / 2
