"""MtpNetwork is a multi-token prediction layer: projection, decoder block, norm, and the target's head.

MiMo           projection of [hidden; embedding], Qwen2's block
GLM-4.5, 4.6   projection of [embedding; hidden], grouped queries partly rotated, experts
DeepSeek-V3    projection of [embedding; hidden], latent attention, experts
"""

from __future__ import annotations

import torch
from torch import nn

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.draft.block import DraftAttention, RmsNorm, SwiGlu
from slime_spec.draft.experts import ExpertMlps
from slime_spec.draft.latent import DraftLatentAttention
from slime_spec.draft.network import StepNetwork
from slime_spec.draft.ranks import ONE_RANK, DraftRanks


class MtpNetwork(StepNetwork):
    """Applies ``input_proj`` to the normed hidden state and embedding, then the block and ``final_layernorm``.

    Features are the target's hidden state after its final norm; the recurrent state is the layer's own output after
    ``final_layernorm``, to which the target's head is applied. Parameters have MiMo's names; ``stored_name`` of
    slime_spec.draft.build has those of checkpoints.
    """

    def __init__(self, spec: DraftSpec, ranks: DraftRanks = ONE_RANK) -> None:
        super().__init__()
        self.spec = spec
        block = spec.block
        size, eps = block.hidden_size, block.rms_norm_eps
        self.token_layernorm = RmsNorm(size, eps)
        self.hidden_layernorm = RmsNorm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm = RmsNorm(size, eps)
        self.self_attn = DraftAttention(block, size) if block.latent is None else DraftLatentAttention(block)
        self.post_attention_layernorm = RmsNorm(size, eps)
        kind = block.experts
        self.mlp = SwiGlu(size, block.intermediate_size) if kind is None else ExpertMlps(kind, size, ranks)
        self.is_spread = kind is not None and ranks.size > 1
        self.final_layernorm = RmsNorm(size, eps)

    @property
    def attention(self) -> DraftAttention | DraftLatentAttention:
        return self.self_attn

    def inputs(self, hidden: torch.Tensor, embedding: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        halves = [self.hidden_layernorm(hidden), self.token_layernorm(embedding)]
        x: torch.Tensor = self.input_proj(torch.cat(halves if self.spec.hidden_first else halves[::-1], dim=-1))
        return self.input_layernorm(x), x

    def after_attention(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.final_layernorm(x + self.mlp(self.post_attention_layernorm(x)))
        return y, y
