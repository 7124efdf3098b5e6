"""Rotary position embedding computes its tables once and applies them in three operations."""

from __future__ import annotations

import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope import inverse_frequencies


class RopeTable:
    """Holds cos and sin for every position, [positions, head_dim]; sin carries the sign of the rotated half.

    The tables are computed in fp32 and rounded to the compute dtype, as transformers does.
    """

    def __init__(self, spec: ModelSpec, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(spec))
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat([cos, cos], dim=-1).to(device, dtype)
        self.sin_signed = torch.cat([-sin, sin], dim=-1).to(device, dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and signed sin [tokens, 1, head_dim] for integer ``positions`` [tokens]."""
        return self.cos.index_select(0, positions).unsqueeze(1), self.sin_signed.index_select(0, positions).unsqueeze(1)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin_signed: torch.Tensor) -> torch.Tensor:
    """Rotate ``heads`` [tokens, heads, head_dim]: x cos + (second half, first half) signed sin."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return heads * cos + swapped * sin_signed
