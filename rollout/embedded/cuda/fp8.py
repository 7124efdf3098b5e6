"""This function launches the Triton kernel that multiplies by fp8 weights: it reads a byte a weight.

A draft's passes have few rows, so that the time of a product is that of reading the weights; tensor cores that multiply
fp8 by fp8 would only round the activations. Each weight becomes a number of the activations' dtype in registers,
exactly, and a block's scale multiplies the block's sums, which are fp32.
"""

from __future__ import annotations

import torch
import triton

from rollout.embedded.cuda.fp8_kernel import multiply_by_blocks
from rollout.embedded.cuda.operators import LARGEST_TILE, LEAST_DOT, PROGRAMS
from rollout.embedded.drafters.fp8_blocks import BLOCK

# Each divides a block: the outputs of a program have one scale for each block of inputs.
OUTPUT_TILES = (128, 64, 32, 16)


def product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return x W^T + b [tokens, out] in ``dtype``, for ``x`` [tokens, in], ``weight`` [out, in] in e4m3.

    ``scales`` are fp32 [⌈out / BLOCK⌉, ⌈in / BLOCK⌉]; W is a weight times the scale of the weight's block.
    """
    tokens, (outputs, inputs) = x.shape[0], weight.shape
    out = torch.empty(tokens, outputs, dtype=dtype, device=x.device)
    rows = min(max(triton.next_power_of_2(tokens), LEAST_DOT), LARGEST_TILE)
    row_tiles = triton.cdiv(tokens, rows)
    columns = next(
        tile for tile in OUTPUT_TILES if triton.cdiv(outputs, tile) * row_tiles >= PROGRAMS or tile == OUTPUT_TILES[-1]
    )
    wide = x.dtype == torch.float32 or not x.is_cuda  # the interpreter multiplies the bits of bf16
    multiply_by_blocks[(triton.cdiv(outputs, columns), row_tiles)](
        *(x.contiguous(), weight, scales, x if bias is None else bias, out, tokens, outputs, inputs),
        *(bias is not None, rows, columns, BLOCK, wide),
        num_warps=4,
        num_stages=1 if wide else 4,
    )
    return out
