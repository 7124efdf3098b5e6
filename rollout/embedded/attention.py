"""This module computes a pass's attention in torch's operators: CUDA runs it, tests compare the CPU kernels with it.

The query heads that share a KV head become extra query rows.

    plain     rows whose prompt is in their own KV:   softmax(q K_own) V_own
    cascade   rows whose prompt is a shared prefix:   softmax([q K_prefix | q K_own]) [V_prefix ; V_own]

In the cascade the prefix's keys are read once per group: queries of a group's rows are folded into one matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rollout.embedded.plan import AttentionPlan, PrefixPlan


def attend(
    layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Store this pass's keys and values [tokens, kv_heads, head_dim]; return attention [tokens, heads * head_dim].

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
    own_keys = plan.store.keys[layer][plan.live, :, : plan.length]
    own_values = plan.store.values[layer][plan.live, :, : plan.length]
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
    """Return one softmax over [prefix | own]; ``query`` [rows, kv_heads, queries, head_dim]."""
    query = query * query.shape[-1] ** -0.5
    prefix_keys = prefix.store.keys[layer][: prefix.num_prefixes, :, : prefix.length]
    prefix_values = prefix.store.values[layer][: prefix.num_prefixes, :, : prefix.length]
    prefix_scores = _to_rows(torch.matmul(_to_slots(query, prefix), prefix_keys.transpose(-1, -2)), prefix)
    own_scores = torch.matmul(query, keys.transpose(-1, -2))
    if mask is not None:
        own_scores = own_scores + mask
    # Filled, not added: another group's prompt may hold NaN.
    scores = torch.cat([prefix_scores.masked_fill(prefix.hidden, -torch.inf), own_scores], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    prefix_weights, own_weights = weights.split([prefix.length, keys.shape[2]], dim=-1)
    prefix_out = _to_rows(torch.matmul(_to_slots(prefix_weights, prefix), prefix_values), prefix)
    has_none = prefix.hidden[..., :1]  # a row without a prefix, which must not get 0 times NaN of another's
    return torch.matmul(own_weights, values) + prefix_out.masked_fill(has_none, 0.0)


def _to_slots(rows: torch.Tensor, prefix: PrefixPlan) -> torch.Tensor:
    """Return [prefixes, kv_heads, members * queries, width] from [rows, kv_heads, queries, width]."""
    _, kv_heads, queries, width = rows.shape
    slots = rows.index_select(0, prefix.row_of_slot).view(prefix.num_prefixes, -1, kv_heads, queries, width)
    return slots.transpose(1, 2).reshape(prefix.num_prefixes, kv_heads, -1, width)


def _to_rows(slots: torch.Tensor, prefix: PrefixPlan) -> torch.Tensor:
    """Return the inverse of ``_to_slots``."""
    prefixes, kv_heads, _, width = slots.shape
    members = slots.view(prefixes, kv_heads, prefix.num_members, -1, width).transpose(1, 2)
    return members.reshape(prefixes * prefix.num_members, kv_heads, -1, width).index_select(0, prefix.slot_of_row)
