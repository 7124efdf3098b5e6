"""This Triton kernel multiplies few tokens with a weight: at one token a product is the reading of its weight.

What lies before a product (the residual's sum, its norm) and behind it (the activation, the residual) is computed on
the way, so that none of it costs a launch. A program reads whole rows of the weight, BLOCK_K columns at a time.
"""

import triton
import triton.language as tl


@triton.jit
def _rows_of(weight, first, columns, width, outputs, BLOCK_N: tl.constexpr):
    """Return columns of BLOCK_N rows of a weight [1, BLOCK_N, BLOCK_K] in fp32; nobody reads them again."""
    rows = first + tl.arange(0, BLOCK_N)
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    there = (rows < outputs)[:, None] & (columns < width)[None, :]
    return tl.load(weight + at, mask=there, other=0.0, eviction_policy="evict_first").to(tl.float32)[None, :, :]


@triton.jit
def _finish(
    total,
    gate_total,
    scale,
    bias,
    out,
    first,
    tokens,
    outputs,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a program's outputs from its sums of products [BLOCK_T, BLOCK_N] and its tokens' scales [BLOCK_T]."""
    token, rows = tl.arange(0, BLOCK_T), first + tl.arange(0, BLOCK_N)
    there = (token < tokens)[:, None] & (rows < outputs)[None, :]
    made = total * scale[:, None]
    if HAS_BIAS:
        made += tl.load(bias + rows, mask=rows < outputs, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = gate_total * scale[:, None]
        made *= gate / (1.0 + tl.exp(-gate))
    target = out + token[:, None] * outputs + rows[None, :]
    if ADDS:
        made += tl.load(target, mask=there, other=0.0)
    tl.store(target, made.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def multiply(
    x,
    delta,
    sums,
    norm,
    weight,
    bias,
    out,
    tokens,
    width,
    outputs,
    eps,
    NORMS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [tokens, outputs] = x weight^T for x [tokens, width], weight [outputs, width]; a program for BLOCK_N outputs.

    With HAS_DELTA x + delta is read, which the first program keeps in fp32 ``sums``; with NORMS its RMS norm is.
    A GATED weight has the gates' rows before the others, and silu(gate) * other is written. ADDS adds to fp32 ``out``.
    """
    first = tl.program_id(0) * BLOCK_N
    token = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_K], dtype=tl.float32)
    gate_total = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_K)
        at = token[:, None] * width + columns[None, :]
        there = (token < tokens)[:, None] & (columns < width)[None, :]
        values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        if HAS_DELTA:
            values += tl.load(delta + at, mask=there, other=0.0).to(tl.float32)
            of_first = (token + first * BLOCK_T < tokens)[:, None]  # all tokens where first is 0, else none
            tl.store(sums + at, values, mask=there & of_first)
        if NORMS:  # the scale of a token's norm is the same for all of its products, and comes last
            squares += values * values
            values *= tl.load(norm + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        rows = weight
        if GATED:
            gate_total += values[:, None, :] * _rows_of(weight, first, columns, width, outputs, BLOCK_N)
            rows = weight + outputs.to(tl.int64) * width
        total += values[:, None, :] * _rows_of(rows, first, columns, width, outputs, BLOCK_N)
    scale = tl.full([BLOCK_T], 1.0, dtype=tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / width + eps)
    sums_of_gates = tl.sum(gate_total, axis=2) if GATED else scale
    _finish(
        *(tl.sum(total, axis=2), sums_of_gates, scale, bias, out, first, tokens, outputs),
        *(HAS_BIAS, GATED, ADDS, BLOCK_T, BLOCK_N),
    )
