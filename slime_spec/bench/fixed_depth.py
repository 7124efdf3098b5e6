"""A controller of a fixed depth makes an engine draft as deep in every round, whatever that costs."""

from __future__ import annotations

from collections.abc import Sequence

from slime_spec.speculation.controller import Controller, RoundPlan, RowState
from slime_spec.speculation.round_costs import RoundCosts


class FixedDepth(Controller):
    """Plans ``depth`` drafts for every sequence that may have as many, and keeps all that a text gave."""

    def __init__(self, costs: RoundCosts, depth: int, max_nodes: int) -> None:
        super().__init__(costs, depth, max_nodes)
        self._depth = depth

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        return RoundPlan(tuple(min(self._depth, row.max_depth) for row in rows))

    def again(self, limits: Sequence[int]) -> RoundPlan:
        return RoundPlan(tuple(min(self._depth, limit) for limit in limits))

    def kept_nodes(self, rows: Sequence[RowState], chances: Sequence[Sequence[float]]) -> tuple[list[int], bool]:
        return [len(of_row) for of_row in chances], False
