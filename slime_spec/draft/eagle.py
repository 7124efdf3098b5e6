"""EagleNetwork is the draft network of EAGLE (arXiv 2401.15077), LlamaForCausalLMEagle in SGLang."""

from __future__ import annotations

import torch
from torch import nn

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.block import DraftAttention, RmsNorm, SwiGlu
from slime_spec.draft.network import StepNetwork


class EagleLayer(nn.Module):
    """Implements the only block of an EAGLE draft, which has no norm before its attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.self_attn = DraftAttention(spec, spec.hidden_size)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = SwiGlu(spec.hidden_size, spec.intermediate_size)


class EagleNetwork(StepNetwork):
    """Applies fc to [embedding; hidden], then one block; the target's head reads what comes out, without a norm.

    Features are the target's hidden state after its final norm; the recurrent state is the block's output.
    """

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        assert spec.block.num_layers == 1, "drafts of several layers are served, not trained"
        self.spec = spec
        size = spec.block.hidden_size
        self.fc = nn.Linear(2 * size, size, bias=spec.fc_bias)
        self.layers = nn.ModuleList([EagleLayer(spec.block)])

    @property
    def layer(self) -> EagleLayer:
        layer = self.layers[0]
        assert isinstance(layer, EagleLayer), "its only layer"
        return layer

    @property
    def attention(self) -> DraftAttention:
        return self.layer.self_attn

    def inputs(self, hidden: torch.Tensor, embedding: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x: torch.Tensor = self.fc(torch.cat([embedding, hidden], dim=-1))
        return x, x

    def after_attention(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + self.layer.mlp(self.layer.post_attention_layernorm(x))
        return y, y
