"""Every draft network is made of these modules: RMSNorm, rotary GQA attention over its own round's keys, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope import inverse_frequencies
from slime_spec.checkpoints.rope_settings import Yarn


class RmsNorm(nn.Module):
    """Computes x / rms(x) · weight over the last dimension, ``eps`` inside the root."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class SwiGlu(nn.Module):
    """Computes down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


@dataclass(frozen=True)
class KeysValues:
    """Holds rotated keys and values [batch, tokens, kv_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor


class DraftAttention(nn.Module):
    """Computes the attention of a draft's block; ``input_size`` is 2·hidden in EAGLE-3: [embedding; hidden]."""

    inv_freq: torch.Tensor

    def __init__(self, spec: ModelSpec, input_size: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, q_size, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(input_size, kv_size, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(input_size, kv_size, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(q_size, spec.hidden_size, bias=spec.out_bias)
        if spec.qk_norm:
            self.q_norm = RmsNorm(self.head_dim, spec.rms_norm_eps)
            self.k_norm = RmsNorm(self.head_dim, spec.rms_norm_eps)
        self.has_qk_norm = spec.qk_norm
        self.rotary_dim = spec.rotary_dim
        self.register_buffer("inv_freq", inverse_frequencies(spec), persistent=False)
        self.magnitude = spec.rope_scaling.magnitude if isinstance(spec.rope_scaling, Yarn) else 1.0

    def keys_values(self, x: torch.Tensor, positions: torch.Tensor) -> KeysValues:
        """Compute the keys and values of inputs [batch, tokens, input_size] at ``positions`` [batch, tokens]."""
        keys = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        values = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.has_qk_norm:
            keys = self.k_norm(keys)
        return KeysValues(self._rotated(keys, positions), values)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        context: KeysValues,
        visible: torch.Tensor,
        own: Sequence[KeysValues] = (),
    ) -> torch.Tensor:
        """Return attention output [batch, rows, hidden] of inputs [batch, rows, input_size].

        Row r of sequence b sees ``context`` [batch, tokens, ...] where ``visible[b, r]`` [tokens] says so, and of each
        of ``own`` [batch, rows, ...] its own row only: the keys of its round's earlier steps.
        """
        queries = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        if self.has_qk_norm:
            queries = self.q_norm(queries)
        queries = self._rotated(queries, positions) * self.head_dim**-0.5
        projected: torch.Tensor = self.o_proj(attend(queries, context, visible, own))
        return projected

    def in_blocks(
        self, x: torch.Tensor, positions: torch.Tensor, context: KeysValues, visible: torch.Tensor
    ) -> torch.Tensor:
        """Return attention output [batch, rows, size, hidden] of blocks [batch, rows, size, input_size].

        ``positions`` are [batch, rows, size]. A token of row r sees ``context`` [batch, tokens, ...] where
        ``visible[b, r]`` [tokens] says so, and all of its own block.
        """
        batch, rows, size = x.shape[:3]
        flat, places = x.flatten(1, 2), positions.flatten(1)
        own = self.keys_values(flat, places)
        queries = self.q_proj(flat).unflatten(-1, (self.heads, self.head_dim))
        if self.has_qk_norm:
            queries = self.q_norm(queries)
        queries = self._rotated(queries, places) * self.head_dim**-0.5
        group = self.heads // self.kv_heads
        # [batch, kv_heads, rows, size · group, head_dim]: the query heads of one kv head are more rows of it.
        queries = queries.view(batch, rows, size, self.kv_heads, group, self.head_dim).permute(0, 3, 1, 2, 4, 5)
        queries = queries.flatten(3, 4)
        own_keys, own_values = (
            each.unflatten(1, (rows, size)).permute(0, 3, 1, 2, 4) for each in (own.keys, own.values)
        )
        scores = (queries.flatten(2, 3) @ context.keys.permute(0, 2, 3, 1)).unflatten(2, (rows, size * group))
        scores = scores.masked_fill(~visible[:, None, :, None], float("-inf"))
        weights = torch.cat([scores, queries @ own_keys.transpose(-1, -2)], dim=-1).softmax(-1)
        on_context, on_own = weights.split([scores.shape[-1], size], dim=-1)
        out = (on_context.flatten(2, 3) @ context.values.transpose(1, 2)).unflatten(2, (rows, size * group))
        out = (out + on_own @ own_values).unflatten(3, (size, group)).permute(0, 2, 3, 1, 4, 5)
        projected: torch.Tensor = self.o_proj(out.reshape(batch, rows, size, -1))
        return projected

    def _rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Apply rotary embedding to the first columns of [batch, tokens, heads, head_dim], pairing their halves."""
        turned, still = heads.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        return torch.cat([rotated(turned, positions, self.inv_freq, self.magnitude), still], dim=-1)


def rotated(heads: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, magnitude: float) -> torch.Tensor:
    """Apply rotary embedding to [batch, tokens, heads, columns], pairing the halves of a head as Llama does."""
    angles = positions[..., None].float() * inv_freq
    cos, sin = ((turn(angles) * magnitude)[..., None, :].to(heads.dtype) for turn in (torch.cos, torch.sin))
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(
    queries: torch.Tensor, context: KeysValues, visible: torch.Tensor, own: Sequence[KeysValues]
) -> torch.Tensor:
    """Return [batch, rows, heads · value width] of scaled and rotated queries [batch, rows, heads, key width].

    Row r of sequence b sees ``context`` where ``visible[b, r]`` says so, and of each of ``own`` its own row only.
    """
    batch, rows, heads, width = queries.shape
    kv_heads = context.keys.shape[2]
    group = heads // kv_heads
    # [batch, kv_heads, rows · group, width]: the query heads of one kv head are more rows of it.
    queries = queries.view(batch, rows, kv_heads, group, width).permute(0, 2, 1, 3, 4)
    keys = context.keys.permute(0, 2, 3, 1)
    tokens = keys.shape[-1]
    scores = (queries.flatten(2, 3) @ keys).view(batch, kv_heads, rows, group, tokens)
    scores = scores.masked_fill(~visible[:, None, :, None], float("-inf"))
    diagonal = [(queries * each.keys.transpose(1, 2)[:, :, :, None]).sum(-1, keepdim=True) for each in own]
    weights = torch.cat([scores, *diagonal], dim=-1).softmax(-1)
    on_context = weights[..., :tokens].reshape(batch, kv_heads, rows * group, tokens)
    values = context.values.transpose(1, 2)
    out = (on_context @ values).view(batch, kv_heads, rows, group, values.shape[-1])
    for index, each in enumerate(own, start=tokens):
        out = out + weights[..., index : index + 1] * each.values.transpose(1, 2)[:, :, :, None]
    return out.permute(0, 2, 1, 3, 4).reshape(batch, rows, heads * values.shape[-1])
