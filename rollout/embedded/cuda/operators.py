"""These functions launch the Triton kernels with block sizes for the tensors at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from rollout.embedded.cuda import kernels, row_kernels
from rollout.embedded.cuda.device_pass import DevicePass
from rollout.embedded.linear import PackedLinear
from slime_spec.checkpoints.model_spec import ModelSpec

LEAST_DOT = 16  # the smallest side of a matrix that tl.dot multiplies
LARGEST_TILE = 64  # queries of a program
SPLITS = (16, 4, 1)  # few, since each is compiled by itself
PROGRAMS = 264  # two for each multiprocessor of a Hopper card: fewer leave memory bandwidth unused
SILU_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """Says how a program of ``row_kernels.multiply`` reads a weight: rows, columns at a time, pieces ahead, warps."""

    rows: int
    columns: int
    stages: int
    warps: int


def add_and_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add ``delta`` to fp32 ``x`` [tokens, width] in place; return the sum's RMS norm in the weight's dtype."""
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    kernels.add_and_norm[(tokens,)](
        *(x, x if delta is None else delta, weight, out, width, eps, delta is not None, block),
        num_warps=min(max(block // 512, 1), 8),
    )
    return out


def silu_times(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [tokens, width] of ``gate_up`` [tokens, 2 width]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    kernels.silu_times[(tokens, triton.cdiv(width, SILU_BLOCK))](gate_up, out, width, SILU_BLOCK, num_warps=4)
    return out


def norm_and_multiply(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: torch.Tensor,
    linear: PackedLinear,
    eps: float,
    gated: bool,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the product of the RMS norm of fp32 x + delta [tokens, width], and x + delta itself.

    With ``gated`` silu(gate) * up [tokens, outputs / 2] is returned of a product of gates and ups.
    """
    outputs = linear.num_outputs // 2 if gated else linear.num_outputs
    out = torch.empty(len(x), outputs, dtype=linear.dtype, device=x.device)
    sums = x if delta is None else torch.empty_like(x)
    _multiply(x, delta, sums, norm, linear, out, eps, gated, tile)
    return out, sums


def multiply_and_add(stream: torch.Tensor, x: torch.Tensor, linear: PackedLinear, tile: Tile) -> None:
    """Add the product of x [tokens, width] to fp32 ``stream`` [tokens, outputs] in place."""
    _multiply(x, None, stream, None, linear, stream, 0.0, False, tile)


def _multiply(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    sums: torch.Tensor,
    norm: torch.Tensor | None,
    linear: PackedLinear,
    out: torch.Tensor,
    eps: float,
    gated: bool,
    tile: Tile,
) -> None:
    """Launch ``row_kernels.multiply``; without a norm the product is added to ``out``."""
    (weight, *biases), (tokens, outputs) = linear.plain_tensors(), out.shape
    bias = biases[0] if biases else None
    assert not gated or bias is None, "no family has a bias at its gates"
    # What is not there is not read: any tensor stands for it.
    row_kernels.multiply[(triton.cdiv(outputs, tile.rows),)](
        *(x, x if delta is None else delta, sums, weight if norm is None else norm, weight),
        *(weight if bias is None else bias, out, tokens, linear.num_inputs, outputs, eps),
        *(norm is not None, delta is not None, bias is not None, gated, norm is None),
        *(triton.next_power_of_2(tokens), tile.rows, tile.columns, tile.stages),
        num_warps=tile.warps,
    )


def rotate_and_store(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    one_pass: DevicePass,
    layer: int,
    spec: ModelSpec,
) -> torch.Tensor:
    """Return the rotated queries [tokens, heads, head_dim] of ``qkv``; its keys and values go into the store.

    ``norms`` are of q and k, ``tables`` cosines and signed sines.
    """
    tokens = qkv.shape[0]
    query = torch.empty(tokens, spec.num_heads, spec.head_dim, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = norms or (qkv, qkv)
    table = one_pass.table
    kernels.rotate_and_store[(tokens, spec.num_heads + 2 * spec.num_kv_heads)](
        *(qkv, query, q_norm, k_norm, *tables, one_pass.positions, one_pass.rows),
        *(table.addresses[layer], table.strides, one_pass.bucket.queries, spec.rms_norm_eps),
        *(spec.num_heads, spec.num_kv_heads, spec.head_dim, triton.next_power_of_2(spec.head_dim // 2)),
        norms is not None,
        num_warps=1,
    )
    return query


def attend(query: torch.Tensor, one_pass: DevicePass, layer: int, spec: ModelSpec) -> torch.Tensor:
    """Return the attention [tokens, heads * head_dim] of rotated queries over the slots that each sees."""
    bucket, table = one_pass.bucket, one_pass.table
    members = bucket.queries * (spec.num_heads // spec.num_kv_heads)
    tile = min(max(triton.next_power_of_2(members), LEAST_DOT), LARGEST_TILE)
    tiles = triton.cdiv(members, tile)
    splits = num_splits(bucket.rows * tiles * spec.num_kv_heads)
    out = torch.empty_like(query)
    parts, scores = out, out
    if splits > 1:
        parts = torch.empty(*query.shape[:2], splits, spec.head_dim, dtype=torch.float32, device=query.device)
        scores = torch.empty(*query.shape[:2], splits, 2, dtype=torch.float32, device=query.device)
    block_d = max(triton.next_power_of_2(spec.head_dim), LEAST_DOT)
    wide = query.dtype == torch.float32 or not query.is_cuda  # the interpreter multiplies the bits of bf16
    kernels.attend_split[(bucket.rows * tiles, spec.num_kv_heads, splits)](
        *(query, out, parts, scores, one_pass.rows, one_pass.lineage, table.addresses[layer], table.strides),
        *(bucket.queries, tiles, spec.head_dim**-0.5, spec.num_heads, spec.num_kv_heads, spec.head_dim, block_d, tile),
        *(32 if wide else 64, splits, bucket.words, wide),
        num_warps=4,
        num_stages=1 if wide else 2,
    )
    if splits > 1:
        heads = query.shape[0] * query.shape[1]
        kernels.merge_splits[(heads,)](parts, scores, out, spec.head_dim, block_d, splits, num_warps=2)
    return out.view(query.shape[0], -1)


def num_splits(programs: int) -> int:
    """Return into how many parts attention is split, so that the card is full."""
    return next(splits for splits in SPLITS if splits * programs <= PROGRAMS or splits == 1)
