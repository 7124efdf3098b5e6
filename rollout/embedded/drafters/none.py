"""The drafter of NONE never drafts, so that every round is a plain decode step."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.embedded.drafting import NO_DRAFT, Draft, DraftContext, WeightlessDrafter
from slime_spec.config.tree import SpeculativeConfig


class NoneDrafter(WeightlessDrafter):
    """Proposes empty drafts."""

    def __init__(self, config: SpeculativeConfig) -> None:
        pass

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [NO_DRAFT] * len(contexts)
