"""Attention of one pass: a plan made once, used by every layer.

Tokens of a pass are packed ([tokens], rows one after another, each row with its own number of tokens), because the
linear layers cost per token. Attention needs a rectangle, so a plan says how to pad and unpack; the query heads that
share a KV head become extra query rows.

    plain     rows whose prompt is in their own KV:   softmax(q K_own) V_own
    cascade   rows whose prompt is a shared prefix:   softmax([q K_prefix | q K_own]) [V_prefix ; V_own]

In the cascade the prefix's keys are read once per group: queries of a group's rows are folded into one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rollout.embedded.kv_cache import KvStore


@dataclass(frozen=True)
class RowSpan:
    """The tokens one row brings to a pass: ``count`` tokens stored from ``start`` on, after ``prefix_len`` others."""

    row: int
    start: int
    count: int
    prefix_row: int = -1
    prefix_len: int = 0


@dataclass(frozen=True)
class PrefixPlan:
    """Which shared prefix each row reads; a slot is (prefix, member), padded to the largest group."""

    store: KvStore
    num_prefixes: int
    num_members: int
    length: int
    row_of_slot: torch.Tensor  # [prefixes * members]
    slot_of_row: torch.Tensor  # [rows]
    mask: torch.Tensor  # [rows, 1, 1, length], 0 or -inf


@dataclass(frozen=True)
class AttentionPlan:
    """Where a pass's tokens go and what they may see."""

    store: KvStore
    first_row: int
    num_rows: int
    num_queries: int
    length: int
    positions: torch.Tensor  # [tokens], absolute
    write_index: torch.Tensor
    mask: torch.Tensor | None  # [rows, 1, queries * group or 1, length], 0 or -inf
    pad_index: torch.Tensor | None  # [rows * queries] -> token
    pack_index: torch.Tensor | None  # [tokens] -> rows * queries
    prefix: PrefixPlan | None


def make_plan(
    store: KvStore,
    spans: Sequence[RowSpan],
    heads_per_kv: int,
    dtype: torch.dtype,
    device: torch.device,
    prefixes: KvStore | None = None,
) -> AttentionPlan:
    """Plan one pass over consecutive rows; every token sees its prefix, its row's earlier tokens and itself."""
    counts = [span.count for span in spans]
    num_queries = max(counts)
    length = max(span.start + span.count for span in spans)
    starts = torch.tensor([span.start for span in spans])
    last = torch.tensor(counts).unsqueeze(1) - 1
    # A padded query repeats its row's last one: it may see something, and its result is dropped.
    offsets = torch.minimum(torch.arange(num_queries).expand(len(spans), -1), last)
    own_positions = starts.unsqueeze(1) + offsets
    real = torch.arange(num_queries) <= last
    packed_rows = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(counts))
    packed_own = own_positions[real]
    prefix_lens = torch.tensor([span.prefix_len for span in spans])
    pad_index = pack_index = None
    if min(counts) != num_queries:
        first_token = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        pad_index = (first_token.unsqueeze(1) + offsets).flatten().to(device)
        pack_index = real.flatten().nonzero().squeeze(1).to(device)
    return AttentionPlan(
        store=store,
        first_row=spans[0].row,
        num_rows=len(spans),
        num_queries=num_queries,
        length=length,
        positions=(packed_own + prefix_lens[packed_rows]).to(device),
        write_index=store.write_index((packed_rows + spans[0].row).to(device), packed_own.to(device)),
        mask=_own_mask(own_positions, length, heads_per_kv, dtype, device),
        pad_index=pad_index,
        pack_index=pack_index,
        prefix=_prefix_plan(spans, prefixes, dtype, device) if prefixes is not None else None,
    )


def _own_mask(
    own_positions: torch.Tensor, length: int, heads_per_kv: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    if int(own_positions.min()) == length - 1:
        return None
    hidden = torch.arange(length) > own_positions.unsqueeze(-1)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    if own_positions.shape[1] > 1:
        mask = mask.repeat_interleave(heads_per_kv, dim=1)
    return mask.unsqueeze(1).to(device)


def _prefix_plan(
    spans: Sequence[RowSpan], store: KvStore, dtype: torch.dtype, device: torch.device
) -> PrefixPlan | None:
    members: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        if span.prefix_row >= 0:
            members.setdefault(span.prefix_row, []).append(index)
    if not members:
        return None
    # A row without a prefix sits in some prefix's slots too; its mask gives every position there weight zero.
    members[min(members)].extend(index for index, span in enumerate(spans) if span.prefix_row < 0)
    num_prefixes = max(members) + 1
    num_members = max(map(len, members.values()))
    row_of_slot = [0] * (num_prefixes * num_members)
    slot_of_row = [0] * len(spans)
    for prefix_row, rows in members.items():
        for member, index in enumerate(rows):
            slot = prefix_row * num_members + member
            row_of_slot[slot], slot_of_row[index] = index, slot
    lens = torch.tensor([span.prefix_len for span in spans])
    length = int(lens.max())
    hidden = torch.arange(length) >= lens.unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return PrefixPlan(
        store=store,
        num_prefixes=num_prefixes,
        num_members=num_members,
        length=length,
        row_of_slot=torch.tensor(row_of_slot, device=device),
        slot_of_row=torch.tensor(slot_of_row, device=device),
        mask=mask.view(len(spans), 1, 1, length).to(device),
    )


def attend(
    layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Store this pass's keys and values [tokens, kv_heads, head_dim]; attend; [tokens, heads * head_dim].

    ``query`` is [tokens, heads, head_dim]; heads sharing a KV head are neighbours.
    """
    plan.store.write(layer, plan.write_index, keys, values)
    _, num_heads, head_dim = query.shape
    kv_heads, rows, queries = keys.shape[1], plan.num_rows, plan.num_queries
    group = num_heads // kv_heads
    if plan.pad_index is not None:
        query = query.index_select(0, plan.pad_index)
    folded = query.reshape(rows, queries, kv_heads, group, head_dim).transpose(1, 2)
    folded = folded.reshape(rows, kv_heads, queries * group, head_dim)
    live = slice(plan.first_row, plan.first_row + rows)
    own_keys = plan.store.keys[layer][live, :, : plan.length]
    own_values = plan.store.values[layer][live, :, : plan.length]
    if plan.prefix is None:
        out = F.scaled_dot_product_attention(folded, own_keys, own_values, attn_mask=plan.mask)
    else:
        out = _cascade(layer, folded, own_keys, own_values, plan.mask, plan.prefix)
    out = out.view(rows, kv_heads, queries, group, head_dim).transpose(1, 2).reshape(rows * queries, -1)
    return out if plan.pack_index is None else out.index_select(0, plan.pack_index)


def _cascade(
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: PrefixPlan,
) -> torch.Tensor:
    """One softmax over [prefix | own]; ``query`` [rows, kv_heads, queries, head_dim]."""
    query = query * query.shape[-1] ** -0.5
    prefix_keys = prefix.store.keys[layer][: prefix.num_prefixes, :, : prefix.length]
    prefix_values = prefix.store.values[layer][: prefix.num_prefixes, :, : prefix.length]
    prefix_scores = _to_rows(torch.matmul(_to_slots(query, prefix), prefix_keys.transpose(-1, -2)), prefix)
    own_scores = torch.matmul(query, keys.transpose(-1, -2))
    if mask is not None:
        own_scores = own_scores + mask
    scores = torch.cat([prefix_scores + prefix.mask, own_scores], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    prefix_weights, own_weights = weights.split([prefix.length, keys.shape[2]], dim=-1)
    prefix_out = _to_rows(torch.matmul(_to_slots(prefix_weights, prefix), prefix_values), prefix)
    return torch.matmul(own_weights, values) + prefix_out


def _to_slots(rows: torch.Tensor, prefix: PrefixPlan) -> torch.Tensor:
    """[rows, kv_heads, queries, width] -> [prefixes, kv_heads, members * queries, width]."""
    _, kv_heads, queries, width = rows.shape
    slots = rows.index_select(0, prefix.row_of_slot).view(prefix.num_prefixes, -1, kv_heads, queries, width)
    return slots.transpose(1, 2).reshape(prefix.num_prefixes, kv_heads, -1, width)


def _to_rows(slots: torch.Tensor, prefix: PrefixPlan) -> torch.Tensor:
    """The inverse of ``_to_slots``."""
    prefixes, kv_heads, _, width = slots.shape
    members = slots.view(prefixes, kv_heads, prefix.num_members, -1, width).transpose(1, 2)
    return members.reshape(prefixes * prefix.num_members, kv_heads, -1, width).index_select(0, prefix.slot_of_row)
