"""The decoder's forward pass: packed tokens in, hidden states out, logits only for the rows asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from rollout.embedded.attention import AttentionPlan, attend
from rollout.embedded.linear import PackedLinear
from rollout.embedded.rope import RopeTable, rotate
from slime_spec.hf.model_spec import ModelSpec


@dataclass
class Layer:
    """One block's weights; q, k and v are one matrix, gate and up another."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    out: PackedLinear
    post_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


@dataclass
class Decoder:
    """The weights of one version and the forward pass over them."""

    spec: ModelSpec
    rope: RopeTable
    embedding: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    head: PackedLinear

    @torch.inference_mode()
    def hidden(self, token_ids: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Hidden states [tokens, hidden] after the last block, before the final norm; writes the KV store."""
        x = F.embedding(token_ids, self.embedding)
        cos, sin_signed = self.rope.at(plan.positions)
        for index, layer in enumerate(self.layers):
            x = x + self._attention(x, layer, index, cos, sin_signed, plan)
            gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return x

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits [rows, vocab] of hidden states [rows, hidden]."""
        return self.head(self._norm(hidden, self.norm)).float()

    def move(self, device: torch.device) -> None:
        """Move every weight; only where nothing is packed (CUDA and back)."""
        self.embedding, self.norm = self.embedding.to(device), self.norm.to(device)
        if self.spec.tie_word_embeddings:
            self.head = PackedLinear(self.embedding, prepack=False)  # moved by itself, it would be a second table
        else:
            self.head.move(device)
        for layer in self.layers:
            for item in fields(layer):
                value = getattr(layer, item.name)
                if isinstance(value, PackedLinear):
                    value.move(device)
                elif value is not None:
                    setattr(layer, item.name, value.to(device))

    def _attention(
        self, x: torch.Tensor, layer: Layer, index: int, cos: torch.Tensor, sin: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        qkv = layer.qkv(self._norm(x, layer.input_norm)).view(-1, heads + 2 * kv_heads, self.spec.head_dim)
        qk, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            query, keys = self._norm(qk[:, :heads], layer.q_norm), self._norm(qk[:, heads:], layer.k_norm)
            qk = torch.cat([query, keys], dim=1)
        qk = rotate(qk, cos, sin)
        return layer.out(attend(index, qk[:, :heads], qk[:, heads:], values, plan))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.spec.rms_norm_eps)
