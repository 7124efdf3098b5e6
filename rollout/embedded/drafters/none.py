"""The drafter of NONE never drafts, so that every round is a plain decode step."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafting import DraftContext, WeightlessDrafter
from slime_spec.config.tree import SpeculativeConfig


class NoneDrafter(WeightlessDrafter):
    """Proposes empty drafts."""

    def __init__(self, config: SpeculativeConfig) -> None:
        pass

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [NO_DRAFT] * len(contexts)
