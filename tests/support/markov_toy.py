"""A draft model whose logits depend on the last token alone, beside a target: small enough for every draft there is."""

from __future__ import annotations

import torch

from rollout.embedded.drafters.chain import chain_distribution
from rollout.embedded.drafters.step import Heads

TARGET_LOGITS = (torch.tensor([[5, 3, 2], [2, 7, 1], [3, 3, 4]], dtype=torch.float64) / 10).log()
DRAFT_LOGITS = TARGET_LOGITS + 0.7 * torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double()


def drawn_from(token: int, temperature: float = 1.0) -> torch.Tensor:
    """What the drafter draws from after ``token`` [3]."""
    return chain_distribution(DRAFT_LOGITS[token : token + 1], torch.tensor([temperature]).double())[0]


def markov_step(tokens: torch.Tensor, hidden: torch.Tensor, spans: object) -> Heads:
    """A step of the drafter."""
    return Heads(DRAFT_LOGITS.float()[tokens], tokens.unsqueeze(1).float())
