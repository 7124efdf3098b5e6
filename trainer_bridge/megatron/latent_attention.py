"""SegmentLatentAttention is Megatron's latent attention (MLA) over packed segments, rotated by explicit angles.

Megatron's own numbers positions by itself, and sums no gradients of the keys' rotated columns over tensor ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from slime_spec.checkpoints.block_parts import LatentAttention
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope_settings import Yarn
from trainer_bridge.megatron.attention import PackedSegments


class SegmentLatentAttention(MLASelfAttention):
    """Computes DeepSeek's attention with keys and values of every head written out; ``model`` describes the widths."""

    def __init__(self, *args: Any, model: ModelSpec, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert model.latent is not None, "the model has latent attention"
        self.latent: LatentAttention = model.latent
        yarn = model.rope_scaling if isinstance(model.rope_scaling, Yarn) else None
        self.magnitude = 1.0 if yarn is None else yarn.magnitude
        score_factor = 1.0 if yarn is None else yarn.score_factor
        self.core_attention.softmax_scale = score_factor / math.sqrt(self.latent.key_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return [T, 1, hidden] (a sequence-parallel rank its rows) of the same, and no bias.

        ``rotary_pos_emb`` are the angles [T, 1, 1, rope_dim] of all rows.
        """
        assert rotary_pos_emb is not None, "the policy model rotates by explicit angles"
        latent, heads = self.latent, self.num_attention_heads_per_partition
        query = self._query(hidden_states).unflatten(-1, (heads, latent.key_dim))
        q_nope, q_rope = query.split([latent.nope_dim, latent.rope_dim], dim=-1)
        compressed, k_rope = self._latents(hidden_states)
        expanded, _ = self.linear_kv_up_proj(self.kv_layernorm(compressed))
        k_nope, value = expanded.unflatten(-1, (heads, -1)).split([latent.nope_dim, latent.value_dim], dim=-1)
        k_rope = self._rotated(k_rope[:, :, None], rotary_pos_emb).expand(-1, -1, heads, -1)
        out = self.core_attention(
            torch.cat([q_nope, self._rotated(q_rope, rotary_pos_emb)], dim=-1),
            torch.cat([k_nope, k_rope], dim=-1),
            value,
            attention_mask,
            packed_seq_params=packed_seq_params,
        )
        projected: tuple[torch.Tensor, None] = self.linear_proj(out)
        return projected

    def _query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the queries of this rank's heads, [T, 1, heads * key_dim]."""
        if self.latent.query_rank is None:
            query: torch.Tensor = self.linear_q_proj(hidden_states)[0]
            return query
        compressed = self._rows_of_rank(self._whole(self.linear_q_down_proj(hidden_states)[0], self.latent.query_rank))
        query = self.linear_q_up_proj(self.q_layernorm(compressed))[0]
        return query

    def _latents(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latent of keys and values, of the rank's rows, and the keys' columns to rotate, of all rows."""
        widths = [self.latent.latent_rank, self.latent.rope_dim]
        down = self._whole(self.linear_kv_down_proj(hidden_states)[0], sum(widths))
        compressed, k_rope = down.split(widths, dim=-1)
        # All ranks' heads read these columns, so that their gradient is a sum over ranks, which a gather's is not.
        return self._rows_of_rank(compressed), copy_to_tensor_model_parallel_region(k_rope)

    @staticmethod
    def _whole(columns: torch.Tensor, width: int) -> torch.Tensor:
        """Return all ranks' columns; every tensor rank has computed its own, of all rows."""
        if columns.size(-1) == width:
            return columns
        whole: torch.Tensor = gather_from_tensor_model_parallel_region(columns)
        return whole

    def _rows_of_rank(self, whole: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = scatter_to_sequence_parallel_region(whole) if self.config.sequence_parallel else whole
        return rows

    def _rotated(self, columns: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Rotate [T, 1, heads, rope_dim]; the result has the halves of pairs side by side, wherever they were."""
        if self.latent.interleaved:
            columns = torch.cat([columns[..., 0::2], columns[..., 1::2]], dim=-1)
        left, right = columns.chunk(2, dim=-1)
        cos, sin = ((f(angles) * self.magnitude).to(columns.dtype) for f in (torch.cos, torch.sin))
        return columns * cos + torch.cat([-right, left], dim=-1) * sin
