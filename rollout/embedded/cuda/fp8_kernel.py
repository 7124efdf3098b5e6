"""A Triton kernel multiplies by fp8 weights whose blocks have a scale each; see ``rollout.embedded.cuda.fp8``."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def multiply_by_blocks(
    x,
    weight,
    scales,
    bias,
    out,
    tokens,
    outputs,
    inputs,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = x W^T + bias, see ``product``; one program for COLUMNS outputs of ROWS tokens.

    The weights are the left side of the products, whose least size on tensor cores is then that of the outputs.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, BLOCK)
    of_scales = scales + tl.program_id(0) * COLUMNS // BLOCK * tl.cdiv(inputs, BLOCK)
    acc = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    for block in range(0, tl.cdiv(inputs, BLOCK)):
        place = block * BLOCK + within
        is_weight = (column < outputs)[:, None] & (place < inputs)[None, :]
        codes = tl.load(weight + column.to(tl.int64)[:, None] * inputs + place[None, :], mask=is_weight, other=0.0)
        is_input = (place < inputs)[:, None] & (row < tokens)[None, :]
        values = tl.load(x + row[None, :] * inputs + place[:, None], mask=is_input, other=0.0)
        if WIDE:
            sums = tl.dot(codes.to(tl.float32), values.to(tl.float32), input_precision="ieee")
        else:
            sums = tl.dot(codes.to(values.dtype), values)
        acc += sums * tl.load(of_scales + block)
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[:, None]
    is_output = (column < outputs)[:, None] & (row < tokens)[None, :]
    tl.store(out + row[None, :] * outputs + column[:, None], acc.to(out.dtype.element_ty), mask=is_output)
