"""The two attention kernels of SGLang's ``intel_amx`` backend, by scaled_dot_product_attention."""

import torch
import torch.nn.functional as F

DECODE = (
    "(Tensor q, Tensor(a!) keys, Tensor(b!) values, float key_scale, float value_scale, Tensor(c!) out, "
    "Tensor? new_keys, Tensor? new_values, Tensor slots, Tensor scratch, Tensor req_to_token, "
    "Tensor req_pool_indices, Tensor seq_lens, float scale, float logit_cap, bool cross, int window, "
    "Tensor? encoder_lens, Tensor? sinks) -> ()"
)
EXTEND = (
    "(Tensor q, Tensor? new_keys, Tensor? new_values, Tensor(a!) out, Tensor keys, Tensor values, float key_scale, "
    "float value_scale, Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, Tensor extend_lens, "
    "Tensor extend_starts, int longest, float scale, float logit_cap, bool cross, int window, Tensor? encoder_lens, "
    "Tensor? sinks, Tensor? tree_mask=None, bool is_causal=True) -> ()"
)


def decode(  # type: ignore[no-untyped-def]
    q, keys, values, key_scale, value_scale, out, new_keys, new_values, slots, scratch, req_to_token,
    req_pool_indices, seq_lens, scale, logit_cap, cross, window, encoder_lens, sinks,
):  # fmt: skip
    """One new token per request; stores its key and value first."""
    if new_keys is not None:
        keys[slots] = new_keys.view(-1, *keys.shape[1:]).to(keys.dtype)
        values[slots] = new_values.view(-1, *values.shape[1:]).to(values.dtype)
    for index, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        seen = req_to_token[row, :length].long()
        if window > 0:
            seen = seen[-window:]
        out[index : index + 1] = attend(q[index : index + 1], keys[seen], values[seen], scale, None)


def extend(  # type: ignore[no-untyped-def]
    q, new_keys, new_values, out, keys, values, key_scale, value_scale, req_to_token, req_pool_indices, seq_lens,
    extend_lens, extend_starts, longest, scale, logit_cap, cross, window, encoder_lens, sinks, tree_mask=None,
    is_causal=True,
):  # fmt: skip
    """Several new tokens per request, causal or by a tree mask [requests, count, count].

    New tokens are attended to as they are given, where they are, and earlier ones as the cache holds them: of latent
    attention's prompts keys and values are given for every head, and the cache holds latents.
    """
    lengths = zip(
        req_pool_indices.tolist(), seq_lens.tolist(), extend_lens.tolist(), extend_starts.tolist(), strict=True
    )
    for index, (row, length, count, start) in enumerate(lengths):
        if count == 0:
            continue
        seen = req_to_token[row, :length].long()
        mask = None
        if is_causal:
            mask = torch.ones(count, length, dtype=torch.bool)
            among_new = torch.ones(count, count, dtype=torch.bool).tril()
            mask[:, length - count :] = among_new if tree_mask is None else tree_mask.view(-1, count, count)[index]
            if window > 0:
                mask &= torch.arange(length) > torch.arange(length - count, length).unsqueeze(1) - window
        new = slice(start, start + count)
        seen_keys, seen_values = keys[seen], values[seen]
        if new_keys is not None:
            earlier = seen[: length - count]
            seen_keys = joined(keys[earlier], new_keys[new])
            seen_values = joined(values[earlier], new_values[new])
        out[new] = attend(q[new], seen_keys, seen_values, scale, mask)


def joined(earlier, new):  # type: ignore[no-untyped-def]
    """[positions, heads, dim] of both; nothing earlier may have another shape."""
    new = new.view(new.shape[0], -1, new.shape[-1])
    return torch.cat([earlier.to(new.dtype), new]) if len(earlier) else new


def attend(q, keys, values, scale, mask):  # type: ignore[no-untyped-def]
    """[tokens, heads, dim] over keys and values [positions, kv_heads, dim]."""
    query, keys, values = (each.to(q.dtype).transpose(0, 1).unsqueeze(0) for each in (q, keys, values))
    grouped = query.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


library = torch.library.Library("sgl_kernel", "DEF")
for name, schema, kernel in (
    ("decode_attention_cpu", DECODE, decode),
    ("extend_attention_cpu", EXTEND, extend),
):
    library.define(name + schema)
    library.impl(name, kernel, "CPU")
