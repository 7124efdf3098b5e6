"""The exhaustive policies try every combination: what the controller's quick choices are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from slime_spec.speculation.controller import RowState
from slime_spec.speculation.round_costs import RoundCosts


def best_depths(
    costs: RoundCosts, rates: Sequence[float], rows: Sequence[RowState], depths: Sequence[int]
) -> tuple[tuple[int, ...], float]:
    """Return the depth of each row that brings most tokens per second, and that rate.

    ``rates[i]`` is the acceptance of draft i given the drafts before; each row may take any of ``depths``, or none.
    Backlogs are paid in the round itself.
    """
    choices = [[0, *(depth for depth in depths if depth <= row.max_depth)] for row in rows]
    scored = ((tokens_per_s(costs, rates, rows, chosen), chosen) for chosen in product(*choices))
    rate, chosen = max(scored)
    return chosen, rate


def best_cut(
    costs: RoundCosts, rows: Sequence[RowState], chances: Sequence[Sequence[float]]
) -> tuple[tuple[int, ...], float]:
    """Return how many first nodes of each row's draft to verify for most tokens per second, and that rate.

    ``chances[row]`` are the probabilities of the nodes of being accepted, of drafts that are made already.
    """

    def rate(kept: Sequence[int]) -> float:
        tokens = sum(1.0 + sum(of_row[:count]) for of_row, count in zip(chances, kept, strict=True))
        attended = sum((1 + count) * row.context for row, count in zip(rows, kept, strict=True))
        return tokens / costs.pass_s(len(rows) + sum(kept), attended)

    most, kept = max((rate(kept), kept) for kept in product(*(range(len(of_row) + 1) for of_row in chances)))
    return kept, most


def tokens_per_s(costs: RoundCosts, rates: Sequence[float], rows: Sequence[RowState], depths: Sequence[int]) -> float:
    """Return the tokens per second of one round with these depths."""
    tokens, verified, attended, behind, num_drafting = 0.0, 0, 0, 0, 0
    for row, depth in zip(rows, depths, strict=True):
        chance = 1.0
        tokens += 1.0
        for position in range(depth):
            chance *= rates[position]
            tokens += chance
        verified += 1 + depth
        attended += (1 + depth) * row.context
        behind += row.backlog if depth else 0
        num_drafting += depth > 0
    return tokens / (costs.pass_s(verified, attended) + costs.draft_s(num_drafting, max(depths), behind))
