"""Trainer and engines share these angles of rotary position embedding."""

from __future__ import annotations

import math

import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope_settings import RopeScaling


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Return theta^(-2i/head_dim) in fp32 [head_dim / 2], rescaled where the checkpoint asks for llama3 scaling."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    return frequencies if spec.rope_scaling is None else _llama3(frequencies, spec.rope_scaling)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Scale as Llama 3.1: long wavelengths are slowed by ``factor``, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_position_embeddings / scaling.high_freq_factor
    shortest_slowed = scaling.original_max_position_embeddings / scaling.low_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slowed = torch.where(wavelengths > shortest_slowed, frequencies / scaling.factor, between)
    return torch.where(wavelengths < longest_kept, frequencies, slowed)
