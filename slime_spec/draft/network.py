"""A trainer uses every family's draft network through this Protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.draft.block import DraftAttention
from slime_spec.draft.latent import DraftLatentAttention


class DraftNetwork(nn.Module):
    """Is a draft's own network.

    ``is_spread``: several ranks hold parts of the network, and compute every step of a batch together.
    """

    spec: DraftSpec
    is_spread: bool = False

    @property
    def own_head(self) -> torch.Tensor | None:
        """Return the network's own head [draft vocab, hidden]; None for a network that uses the target's."""
        return None

    @property
    def head_weight(self) -> torch.Tensor | None:
        """Return the network's own matrix that logits are made with: its head, or a bias beside the target's head."""
        return self.own_head

    @property
    def own_embedding(self) -> torch.Tensor | None:
        """Return the network's own embedding [vocab, hidden]; None for a network that uses the target's."""
        return None


class StepNetwork(DraftNetwork, ABC):
    """Joins a decoder block with its family's own input and output, and drafts step by step.

    A step takes the embedding of a token and a hidden state: at the first step of a round the target's features of
    the token before it, later the network's own ``recurrent`` output of the step before.

        inputs(hidden, embedding, first) ─► attention input, residual ─► attention ─► after_attention(x)
        after_attention(x) ─► (state for the head, state for the next step)
    """

    @property
    @abstractmethod
    def attention(self) -> DraftAttention | DraftLatentAttention: ...

    @abstractmethod
    def inputs(self, hidden: torch.Tensor, embedding: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (attention input, residual) of ``hidden`` [..., features or hidden], ``embedding`` [..., hidden]."""

    @abstractmethod
    def after_attention(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the head's input, the next step's hidden) from the residual stream after attention."""
