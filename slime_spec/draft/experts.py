"""This module computes the mixture of experts of a draft's block, which MTP layers of GLM-4.5 and DeepSeek-V3 have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from slime_spec.checkpoints.block_parts import Experts
from slime_spec.checkpoints.routing import route
from slime_spec.draft.block import SwiGlu
from slime_spec.draft.ranks import ONE_RANK, DraftRanks, experts_of


class Router(nn.Module):
    """Holds the scores' matrix, and the correction of the choice: a buffer, as no gradient reaches it."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, kind: Experts, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.zeros(kind.num_experts, hidden_size))
        if kind.has_correction:
            self.register_buffer("e_score_correction_bias", torch.zeros(kind.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts of each token and their weights, both [tokens, chosen], of x [tokens, hidden]; in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.weight.dtype), self.weight)
            return route(logits, self.kind, self.e_score_correction_bias if self.kind.has_correction else None)


class ExpertMlps(nn.Module):
    """Computes the weighted sum of what a token's experts return, and what the shared expert does.

    Each of ``ranks`` holds some of the experts and computes them for the rows of all ranks.
    """

    def __init__(self, kind: Experts, hidden_size: int, ranks: DraftRanks = ONE_RANK) -> None:
        super().__init__()
        self._ranks = ranks
        self.gate = Router(kind, hidden_size)
        own = experts_of(ranks.rank, ranks.size, kind.num_experts)
        self.experts = nn.ModuleDict({str(expert): SwiGlu(hidden_size, kind.width) for expert in own})
        self.shared_experts = SwiGlu(hidden_size, kind.num_shared * kind.width) if kind.num_shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., hidden] of x [..., hidden]."""
        out = self._ranks.over_all_rows(x.flatten(0, -2), self._of_own_experts).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def _of_own_experts(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights = self.gate(x)
        out = torch.zeros_like(x)
        for expert, mlp in self.experts.items():
            rows, places = (chosen == int(expert)).nonzero(as_tuple=True)
            returned = mlp(x[rows])
            out.index_add_(0, rows, (returned * weights[rows, places, None]).to(out.dtype))
        return out
