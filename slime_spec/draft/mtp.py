"""MtpNetwork is a multi-token prediction layer in MiMo's format: projection, Llama/Qwen2 block, norm, target's head."""

from __future__ import annotations

import torch
from torch import nn

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.draft.block import DraftAttention, RmsNorm, SwiGlu
from slime_spec.draft.network import StepNetwork


class MtpNetwork(StepNetwork):
    """Applies ``input_proj`` to [normed hidden; normed embedding], then the block and ``final_layernorm``.

    Features are the target's hidden state after its final norm; the recurrent state is the layer's own output after
    ``final_layernorm``, to which the target's head is applied. In a checkpoint the parameters' names begin with the
    family's prefix (slime_spec.checkpoints.families).
    """

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        assert spec.hidden_first, "MiMo's projection takes the hidden state first"
        self.spec = spec
        size, eps = spec.block.hidden_size, spec.block.rms_norm_eps
        self.token_layernorm = RmsNorm(size, eps)
        self.hidden_layernorm = RmsNorm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm = RmsNorm(size, eps)
        self.self_attn = DraftAttention(spec.block, size)
        self.post_attention_layernorm = RmsNorm(size, eps)
        self.mlp = SwiGlu(spec.block)
        self.final_layernorm = RmsNorm(size, eps)

    @property
    def attention(self) -> DraftAttention:
        return self.self_attn

    def inputs(self, hidden: torch.Tensor, embedding: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([self.hidden_layernorm(hidden), self.token_layernorm(embedding)], dim=-1)
        x: torch.Tensor = self.input_proj(both)
        return self.input_layernorm(x), x

    def after_attention(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.final_layernorm(x + self.mlp(self.post_attention_layernorm(x)))
        return y, y
