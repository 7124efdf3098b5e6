"""This module computes the latent attention (MLA, arXiv 2405.04434) of a draft's block, as DeepSeek's MTP layer has it.

It is computed expanded: every head has a key and a value. Names are those of checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from slime_spec.checkpoints.block_parts import LATENT_EPS
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope import inverse_frequencies
from slime_spec.checkpoints.rope_settings import Yarn
from slime_spec.draft.block import KeysValues, RmsNorm, attend, rotated


class DraftLatentAttention(nn.Module):
    """Is to a block with latent attention what DraftAttention is to one with grouped queries."""

    inv_freq: torch.Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.latent is not None, "the block has latent attention"
        hidden, latent = spec.hidden_size, spec.latent
        self.heads, self.latent = spec.num_heads, latent
        query_size = self.heads * latent.key_dim
        if latent.query_rank is None:
            self.q_proj = nn.Linear(hidden, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, latent.query_rank, bias=False)
            self.q_a_layernorm = RmsNorm(latent.query_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(latent.query_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, latent.latent_rank + latent.rope_dim, bias=False)
        self.kv_a_layernorm = RmsNorm(latent.latent_rank, LATENT_EPS)
        raised = self.heads * (latent.nope_dim + latent.value_dim)
        self.kv_b_proj = nn.Linear(latent.latent_rank, raised, bias=False)
        self.o_proj = nn.Linear(self.heads * latent.value_dim, hidden, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(spec), persistent=False)
        yarn = spec.rope_scaling if isinstance(spec.rope_scaling, Yarn) else None
        self.magnitude = 1.0 if yarn is None else yarn.magnitude
        self.score_factor = latent.key_dim**-0.5 * (1.0 if yarn is None else yarn.score_factor)

    def keys_values(self, x: torch.Tensor, positions: torch.Tensor) -> KeysValues:
        """Compute the keys and values of inputs [batch, tokens, hidden] at ``positions`` [batch, tokens]."""
        latent = self.latent
        low, shared = self.kv_a_proj_with_mqa(x).split([latent.latent_rank, latent.rope_dim], dim=-1)
        raised = self.kv_b_proj(self.kv_a_layernorm(low)).unflatten(-1, (self.heads, -1))
        keys, values = raised.split([latent.nope_dim, latent.value_dim], dim=-1)
        turned = self._rotated(shared.unsqueeze(-2), positions).expand(-1, -1, self.heads, -1)
        return KeysValues(torch.cat([keys, turned.to(keys.dtype)], dim=-1), values)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        context: KeysValues,
        visible: torch.Tensor,
        own: Sequence[KeysValues] = (),
    ) -> torch.Tensor:
        """Return attention output [batch, rows, hidden] of inputs [batch, rows, hidden]; see DraftAttention."""
        latent = self.latent
        whole = latent.query_rank is None
        queries = self.q_proj(x) if whole else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        still, turning = queries.unflatten(-1, (self.heads, -1)).split([latent.nope_dim, latent.rope_dim], dim=-1)
        queries = torch.cat([still, self._rotated(turning, positions)], dim=-1) * self.score_factor
        projected: torch.Tensor = self.o_proj(attend(queries, context, visible, own))
        return projected

    def _rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate columns that are pairs of neighbours in the weights, which the result has half by half."""
        if self.latent.interleaved:
            heads = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotated(heads, positions, self.inv_freq, self.magnitude)
