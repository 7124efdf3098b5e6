"""Rotary position embedding: tables computed once, applied in three operations."""

from __future__ import annotations

import math

import torch

from slime_spec.hf.model_spec import ModelSpec, RopeScaling


class RopeTable:
    """cos and sin for every position, [positions, head_dim]; sin carries the sign of the rotated half.

    The tables are computed in fp32 and rounded to the compute dtype, as transformers does.
    """

    def __init__(self, spec: ModelSpec, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(spec))
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat([cos, cos], dim=-1).to(device, dtype)
        self.sin_signed = torch.cat([-sin, sin], dim=-1).to(device, dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [tokens, 1, head_dim] for integer ``positions`` [tokens]."""
        return self.cos.index_select(0, positions).unsqueeze(1), self.sin_signed.index_select(0, positions).unsqueeze(1)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin_signed: torch.Tensor) -> torch.Tensor:
    """Rotate ``heads`` [tokens, heads, head_dim]: x cos + (second half, first half) signed sin."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return heads * cos + swapped * sin_signed


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """theta^(-2i/head_dim) [head_dim / 2], rescaled where the checkpoint asks for llama3 scaling."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    return frequencies if spec.rope_scaling is None else _llama3(frequencies, spec.rope_scaling)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: long wavelengths are slowed by ``factor``, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_position_embeddings / scaling.high_freq_factor
    shortest_slowed = scaling.original_max_position_embeddings / scaling.low_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slowed = torch.where(wavelengths > shortest_slowed, frequencies / scaling.factor, between)
    return torch.where(wavelengths < longest_kept, frequencies, slowed)
