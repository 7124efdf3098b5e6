"""A router chooses for each token the experts that compute its MLP, and weighs what they return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rollout.embedded.blocks import gated_mlp
from rollout.embedded.layer import Weights
from rollout.embedded.linear import PackedLinear
from slime_spec.checkpoints.block_parts import Experts
from slime_spec.checkpoints.routing import route


@dataclass
class GatedMlp(Weights):
    """Holds a SwiGLU MLP's weights; gate and up are one matrix."""

    gate_up: PackedLinear
    down: PackedLinear


@dataclass
class ExpertMlps(Weights):
    """Holds a layer's router [experts, hidden], its experts, and what it has besides.

    ``correction`` [experts] is fp32 in any dtype of the rest: rounded it would choose other experts.
    """

    kind: Experts
    router: torch.Tensor
    experts: list[GatedMlp]
    correction: torch.Tensor | None = None
    shared: GatedMlp | None = None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum [tokens, hidden] of what each token's experts return for x [tokens, hidden].

        Beside it those experts [tokens, chosen], the preferred first.
        """
        chosen, weights = route(F.linear(x.float(), self.router.float()), self.kind, self.correction)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            returned = gated_mlp(x[rows], self.experts[expert])
            out.index_add_(0, rows, returned * weights[rows, places, None].to(x.dtype))
        return out if self.shared is None else out + gated_mlp(x, self.shared), chosen
