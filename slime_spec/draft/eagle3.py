"""Eagle3Network is the draft network of EAGLE-3 (arXiv 2503.01840), LlamaForCausalLMEagle3 in SpecForge and SGLang."""

from __future__ import annotations

import torch
from torch import nn

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.block import DraftAttention, RmsNorm, SwiGlu
from slime_spec.draft.network import StepNetwork


class Eagle3Layer(nn.Module):
    """Implements the only block of an EAGLE-3 draft; its attention reads [normed embedding; normed hidden]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.hidden_norm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = DraftAttention(spec, 2 * spec.hidden_size)
        self.post_attention_layernorm = RmsNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = SwiGlu(spec.hidden_size, spec.intermediate_size)


class Eagle3Network(StepNetwork):
    """Applies fc to the captured layers, then one block, a norm and a head over the draft vocabulary.

    Features are [..., captured layers · target hidden], low to high; without captured layers the target's hidden state
    after its final norm. The head's rows are the draft vocabulary's tokens.
    The recurrent state is the residual stream before ``norm`` unless the spec says otherwise.
    """

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        assert spec.block.num_layers == 1, "EAGLE-3 drafts of several layers are served, not trained"
        self.spec = spec
        block, width = spec.block, spec.feature_size
        if spec.fc_norm:
            norms = [RmsNorm(spec.target_hidden_size, block.rms_norm_eps) for _ in spec.capture_layers]
            self.fc_norm = nn.ModuleList(norms)
        if spec.norm_before_fc:
            self.input_norm = RmsNorm(width, block.rms_norm_eps)
        if spec.capture_layers:
            self.fc = nn.Linear(width, block.hidden_size, bias=spec.fc_bias)
        self.midlayer = Eagle3Layer(block)
        self.norm = RmsNorm(block.hidden_size, block.rms_norm_eps)
        if spec.has_own_head:
            self.lm_head = nn.Linear(block.hidden_size, spec.draft_vocab_size, bias=False)
        if spec.has_own_embedding:
            self.embed_tokens = nn.Embedding(block.vocab_size, block.hidden_size)

    @property
    def attention(self) -> DraftAttention:
        return self.midlayer.self_attn

    @property
    def own_head(self) -> torch.Tensor | None:
        return self.lm_head.weight if self.spec.has_own_head else None

    @property
    def own_embedding(self) -> torch.Tensor | None:
        return self.embed_tokens.weight if self.spec.has_own_embedding else None

    def inputs(self, hidden: torch.Tensor, embedding: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = self._joined(hidden) if first else hidden
        embedded, normed = self.midlayer.input_layernorm(embedding), self.midlayer.hidden_norm(x)
        return torch.cat([embedded, normed], dim=-1), normed if self.spec.residual_norm else x

    def after_attention(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + self.midlayer.mlp(self.midlayer.post_attention_layernorm(x))
        normed = self.norm(y)
        return normed if self.spec.logits_norm else y, normed if self.spec.recurrent_norm else y

    def _joined(self, features: torch.Tensor) -> torch.Tensor:
        """Apply fc to the captured layers, normed first where the checkpoint's family does; a final state stays."""
        if not self.spec.capture_layers:
            return features
        if self.spec.norm_before_fc:
            features = self.input_norm(features)
        if self.spec.fc_norm:
            chunks = features.split(self.spec.target_hidden_size, dim=-1)
            features = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        x: torch.Tensor = self.fc(features)
        return x
