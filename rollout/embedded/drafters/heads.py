"""What a draft network answers a step with, and the two vocabularies its tokens live in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rollout.embedded.plan import RowSpan


@dataclass(frozen=True)
class Heads:
    """What a draft network says after some tokens: fp32 ``logits`` [rows, draft vocab] of the next token, and the
    ``hidden`` [rows, hidden] that its next step reads (a whole model has no use for it)."""

    logits: torch.Tensor
    hidden: torch.Tensor


# (token ids [tokens], hidden states [tokens, hidden] they follow, where they go) -> what comes after each
DraftStep = Callable[[torch.Tensor, torch.Tensor, Sequence[RowSpan]], Heads]


@dataclass(frozen=True)
class DraftVocab:
    """``target_ids`` [draft vocab] are the target's ids of the draft head's rows; None where they are the same."""

    target_size: int
    target_ids: torch.Tensor | None = None

    def tokens(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids if self.target_ids is None else self.target_ids[draft_ids]

    def spread(self, q_draft: torch.Tensor) -> torch.Tensor:
        """``q_draft`` [rows, draft vocab] over the target's vocabulary, zero where the draft has no row."""
        if q_draft.shape[1] == self.target_size and self.target_ids is None:
            return q_draft
        full = q_draft.new_zeros(q_draft.shape[0], self.target_size)
        columns = slice(q_draft.shape[1]) if self.target_ids is None else self.target_ids
        full[:, columns] = q_draft
        return full
