"""A controller of a fixed depth makes an engine draft as deep in every round, whatever that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rollout.embedded.core import GenerationCore
from slime_spec.speculation.controller import Controller, RoundPlan, RowState
from slime_spec.speculation.recent_drafts import Candidate
from slime_spec.speculation.round_costs import RoundCosts
from slime_spec.types import GroupRequest

# Rounds that the cost of drafting is fitted to: (sequences, drafts).
FITTED = ((1, 1), (1, 7), (4, 3), (16, 1), (16, 3))
FITTED_TOKENS = 12


class FixedDepth(Controller):
    """Plans ``depth`` drafts for every sequence that may have as many, and keeps all that a text gave."""

    def __init__(self, costs: RoundCosts, depth: int, max_nodes: int) -> None:
        super().__init__(costs, depth, max_nodes)
        self._depth = depth

    def plan(self, rows: Sequence[RowState]) -> RoundPlan:
        return RoundPlan(tuple(min(self._depth, row.max_depth) for row in rows))

    def again(self, limits: Sequence[int]) -> RoundPlan:
        return RoundPlan(tuple(min(self._depth, limit) for limit in limits))

    def keep(self, rows: Sequence[RowState], candidates: Sequence[Candidate], is_probe: bool = False) -> list[int]:
        return [len(each.chances) for each in candidates]


@contextmanager
def fixed_depth(core: GenerationCore, depth: int) -> Iterator[None]:
    """Have a core that decides by itself draft ``depth`` tokens in every round within the block."""
    speculation = core.speculation
    own, costs = speculation.controller, speculation.costs
    assert own is not None, "the core decides by itself"
    assert costs is not None, "by costs that it has timed"
    speculation.controller = FixedDepth(costs, depth, speculation.shape.num_draft_tokens - 1)
    try:
        yield
    finally:
        speculation.controller = own


def fit_drafting(core: GenerationCore, requests: Callable[[int], Sequence[GroupRequest]]) -> None:
    """Run a few rounds of FITTED, so that the core knows what drafting costs it.

    ``requests(batch)`` are groups of so many sequences in all, of FITTED_TOKENS tokens or so.
    """
    for batch, depth in FITTED:
        if batch <= core.settings.max_running and depth <= core.speculation.shape.num_steps:
            with fixed_depth(core, depth):
                for request in requests(batch):
                    core.add(request, lambda sample: None)
                while core.has_work:
                    core.step()
