"""Rotary position embedding computes its tables once and applies them in three operations."""

from __future__ import annotations

import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope import inverse_frequencies
from slime_spec.checkpoints.rope_settings import Yarn


class RopeTable:
    """Holds cos and sin for every position, [positions, rotary_dim]; sin carries the sign of the rotated half.

    The tables are computed in fp32 and rounded to the compute dtype, as transformers does; YaRN's magnitude is in them.
    """

    def __init__(self, spec: ModelSpec, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(spec))
        magnitude = spec.rope_scaling.magnitude if isinstance(spec.rope_scaling, Yarn) else 1.0
        cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
        self.cos = torch.cat([cos, cos], dim=-1).to(device, dtype)
        self.sin_signed = torch.cat([-sin, sin], dim=-1).to(device, dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and signed sin [tokens, 1, rotary_dim] for integer ``positions`` [tokens]."""
        return self.cos.index_select(0, positions).unsqueeze(1), self.sin_signed.index_select(0, positions).unsqueeze(1)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin_signed: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate the first columns of ``heads`` [tokens, heads, head_dim], as many as ``cos`` has; the rest stays.

    x cos + (second half, first half) signed sin. ``interleaved`` columns are pairs of neighbours and are put half by
    half first: queries and keys alike, so that their products are those of the pairs.
    """
    width = cos.shape[-1]
    if interleaved:
        heads = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    turning, rest = heads[..., :width], heads[..., width:]
    turned = turning * cos + turning.roll(width // 2, dims=-1) * sin_signed
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
