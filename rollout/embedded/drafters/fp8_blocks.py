"""Matrices in fp8 have e4m3 weights and an fp32 scale for each block of 128 x 128, as DeepSeek-V3's checkpoints do.

Scales are powers of two, as DeepSeek-V3.1's: a weight times its scale is a number of bf16.
"""

from __future__ import annotations

import torch

from slime_spec.checkpoints.fp8 import FP32_TINY, LARGEST, dequantised, quantised
from slime_spec.checkpoints.quantization import BlockScheme

BLOCK = 128  # rows and columns of weights that share a scale
SCHEME = BlockScheme(BLOCK, BLOCK)
FP32_MANTISSA = 0x7FFFFF


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``weight`` [out, in] in e4m3, and the scales [⌈out / BLOCK⌉, ⌈in / BLOCK⌉] that lead back.

    A scale is the least power of two that brings its block into e4m3's range.
    """
    return quantised(weight, SCHEME, lambda largest: _power_of_two(largest / LARGEST))


def _power_of_two(least: torch.Tensor) -> torch.Tensor:
    """Return the smallest powers of two that are no less than fp32 ``least``, nor subnormal."""
    bits = least.clamp(min=FP32_TINY).view(torch.int32)
    return ((bits + FP32_MANTISSA) & ~FP32_MANTISSA).view(torch.float32)


def from_fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weights [out, in] in fp32 that ``to_fp8`` has rounded."""
    return dequantised(codes, scales, SCHEME)
