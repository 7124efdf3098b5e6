"""Matrices in fp8 have e4m3 weights and an fp32 scale for each block of 128 x 128, as DeepSeek-V3's checkpoints do.

Scales are powers of two, as DeepSeek-V3.1's: a weight times its scale is a number of bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 128  # rows and columns of weights that share a scale
ROWS_AT_ONCE = 16 * BLOCK  # so that the copies in fp32 are small
LARGEST = torch.finfo(torch.float8_e4m3fn).max
FP32_TINY, FP32_MANTISSA = torch.finfo(torch.float32).tiny, 0x7FFFFF


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``weight`` [out, in] in e4m3, and the scales [⌈out / BLOCK⌉, ⌈in / BLOCK⌉] that lead back.

    A scale is the least power of two that brings its block into e4m3's range.
    """
    codes, scales = [], []
    for rows in weight.split(ROWS_AT_ONCE):
        outputs, inputs = rows.shape
        padded = F.pad(rows.float(), (0, -inputs % BLOCK, 0, -outputs % BLOCK))
        blocks = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK)
        scale = _power_of_two(blocks.abs().amax(dim=(1, 3)) / LARGEST)
        rounded = (blocks / scale[:, None, :, None]).view_as(padded)[:outputs, :inputs]
        codes.append(rounded.to(torch.float8_e4m3fn))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def _power_of_two(least: torch.Tensor) -> torch.Tensor:
    """Return the smallest powers of two that are no less than fp32 ``least``, nor subnormal."""
    bits = least.clamp(min=FP32_TINY).view(torch.int32)
    return ((bits + FP32_MANTISSA) & ~FP32_MANTISSA).view(torch.float32)


def from_fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weights [out, in] in fp32 that ``to_fp8`` has rounded."""
    outputs, inputs = codes.shape
    wide = scales.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)[:, :inputs]
    return codes.float() * wide
