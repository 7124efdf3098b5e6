"""What a drafter with a network is told once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_spec.checkpoints.draft_choice import ChosenDraft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.sglang.draft_shape import DraftShape


@dataclass(frozen=True)
class DrafterSetup:
    """The draft and how to run it; ``context_length`` and ``max_total_tokens`` are the engine's bounds, in tokens."""

    config: SpeculativeConfig
    shape: DraftShape
    draft: ChosenDraft
    target: ModelSpec
    dtype: torch.dtype
    device: torch.device
    context_length: int
    max_total_tokens: int

    @property
    def samples_drafts(self) -> bool:
        """Whether drafts are drawn from the draft's distribution, which verification then needs, instead of chosen."""
        return self.config.use_rejection_sampling or self.config.use_block_verification
