"""Trainer and engines share these angles of rotary position embedding."""

from __future__ import annotations

import math

import torch

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.checkpoints.rope_settings import RopeScaling, Yarn


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Return theta^(-2i/d) in fp32 [d / 2] of the d rotated columns, rescaled where the checkpoint asks for it."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    match spec.rope_scaling:
        case None:
            return frequencies
        case Yarn() as yarn:
            return _yarn(frequencies, spec.rope_theta, yarn)
        case scaling:
            return _llama3(frequencies, scaling)


def _yarn(frequencies: torch.Tensor, theta: float, yarn: Yarn) -> torch.Tensor:
    """Scale as YaRN: between the columns that turn ``beta_fast`` and ``beta_slow`` times a straight line is blended."""
    width = 2 * frequencies.numel()

    def column(turns: float) -> float:
        of_context = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(of_context) / (2 * math.log(theta))

    first, last = max(math.floor(column(yarn.beta_fast)), 0), min(math.ceil(column(yarn.beta_slow)), width - 1)
    columns = torch.arange(width // 2, dtype=torch.float32)
    slowed = ((columns - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies / yarn.factor * slowed + frequencies * (1 - slowed)


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
