"""What the GPU's kernels compute, in torch's operators and loops over rows: slow, and easy to believe."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rollout.embedded.cuda.device_pass import WORD_BITS, Column, DevicePass
from rollout.embedded.cuda.operators import Tile
from rollout.embedded.linear import PackedLinear
from rollout.embedded.rope import rotate
from slime_spec.checkpoints.model_spec import ModelSpec


def add_and_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if delta is not None:
        x += delta
    return F.rms_norm(x, weight.shape, weight.float(), eps).to(weight.dtype)


def silu_times(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def norm_and_multiply(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: torch.Tensor,
    linear: PackedLinear,
    eps: float,
    gated: bool,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = x if delta is None else x + delta
    product = product_of(F.rms_norm(sums, norm.shape, norm.float(), eps), linear)
    if gated:
        gate, up = product.chunk(2, dim=-1)
        product = F.silu(gate) * up
    return product.to(linear.dtype), sums


def multiply_and_add(stream: torch.Tensor, x: torch.Tensor, linear: PackedLinear, tile: Tile) -> None:
    stream += product_of(x, linear)


def product_of(x: torch.Tensor, linear: PackedLinear) -> torch.Tensor:
    weight, *biases = (each.float() for each in linear.plain_tensors())
    return F.linear(x.float(), weight, *biases)


def rotate_and_store(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    one_pass: DevicePass,
    layer: int,
    spec: ModelSpec,
) -> torch.Tensor:
    heads = qkv.view(len(qkv), -1, spec.head_dim)
    query, keys, values = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    if norms is not None:
        query, keys = (
            F.rms_norm(each, norm.shape, norm, spec.rms_norm_eps)
            for each, norm in zip((query, keys), norms, strict=True)
        )
    cos, sin = (table[one_pass.positions.long()].unsqueeze(1) for table in tables)
    keys = rotate(keys, cos, sin)
    for index, row in enumerate(rows(one_pass)):
        store = one_pass.table.stores[row[Column.STORE]]
        first, slots = index * one_pass.bucket.queries, slice(row[Column.START], row[Column.START] + row[Column.COUNT])
        tokens = slice(first, first + row[Column.COUNT])
        store.keys[layer][row[Column.ROW], :, slots] = keys[tokens].transpose(0, 1)
        store.values[layer][row[Column.ROW], :, slots] = values[tokens].transpose(0, 1)
    return rotate(query, cos, sin)


def attend(query: torch.Tensor, one_pass: DevicePass, layer: int, spec: ModelSpec) -> torch.Tensor:
    """Every token by itself: which slots it sees, and one softmax over them."""
    out = torch.zeros_like(query)
    group = spec.num_heads // spec.num_kv_heads
    lineage = one_pass.lineage.view(one_pass.bucket.tokens, -1).tolist() if one_pass.bucket.words else None
    for index, row in enumerate(rows(one_pass)):
        store, prefixes = one_pass.table.stores[row[Column.STORE]], one_pass.table.stores[1]
        for number in range(row[Column.COUNT]):
            token = index * one_pass.bucket.queries + number
            words = None if lineage is None else lineage[token]
            seen = [slot for slot in range(row[Column.START] + row[Column.COUNT]) if sees(row, number, words, slot)]
            own = torch.tensor(seen, device=query.device)
            parts = []
            for own_side, prefix_side in ((store.keys, prefixes.keys), (store.values, prefixes.values)):
                side = own_side[layer][row[Column.ROW]].index_select(1, own)
                if row[Column.PREFIX_LEN]:
                    shared = prefix_side[layer][row[Column.PREFIX_ROW], :, : row[Column.PREFIX_LEN]]
                    side = torch.cat([shared, side], dim=1)
                parts.append(side)
            keys, values = (part.repeat_interleave(group, dim=0) for part in parts)
            out[token] = F.scaled_dot_product_attention(query[token].unsqueeze(1), keys, values).squeeze(1)
    return out.view(len(query), -1)


def rows(one_pass: DevicePass) -> list[list[int]]:
    # A list, and not numbers one by one: no operator of torch reads them, which a capture would refuse.
    return one_pass.rows.tolist()


def sees(row: list[int], number: int, words: list[int] | None, slot: int) -> bool:
    if words is None:
        return slot <= row[Column.START] + number
    node = slot - row[Column.TREE_START]
    return node < 0 or bool(words[node // WORD_BITS] >> node % WORD_BITS & 1)
