"""Which cache slot belongs to which token of which request, and moves between slots."""

import ctypes

import torch


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):  # type: ignore[no-untyped-def]
    """Write each request's new slots into its row of the table, from ``start`` to ``end``."""
    offset = 0
    for row, first, last in _rows(req_pool_indices, start, end):
        req_to_token[row, first:last] = out_cache_loc[offset : offset + last - first].to(req_to_token.dtype)
        offset += last - first


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):  # type: ignore[no-untyped-def]
    """The reverse: read each request's slots from ``start`` to ``end``, packed one request after another."""
    offset = 0
    for row, first, last in _rows(req_pool_indices, start, end):
        out_cache_loc[offset : offset + last - first] = req_to_token[row, first:last].to(out_cache_loc.dtype)
        offset += last - first


def assign_draft_cache_locs_contiguous_cpu(  # type: ignore[no-untyped-def]
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    """The slots behind each sequence that its topk * num_steps drafts may use."""
    count = topk * num_steps
    for index, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[row, length : length + count]
        out_cache_loc[index * count : (index + 1) * count] = slots.to(out_cache_loc.dtype)


def build_draft_decode_metadata_cpu(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):  # type: ignore[no-untyped-def]
    """One row of slots per branch: the request's own, then the slots of that branch."""
    rows = []
    for row, length in zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True):
        slots = req_to_token[row]
        for branch in range(topk):
            own = slots.clone()
            first = length + branch * num_steps
            own[length : length + num_steps] = slots[first : first + num_steps]
            rows.append(own)
    return torch.stack(rows) if rows else req_to_token.new_empty((0, pool_len))


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):  # type: ignore[no-untyped-def]
    """Copy slots in every layer's buffer (address and bytes per slot); all are read before any is written."""
    targets, sources = tgt_loc.tolist(), src_loc.tolist()
    for address, nbytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        contents = [ctypes.string_at(address + source * nbytes, nbytes) for source in sources]
        for target, content in zip(targets, contents, strict=True):
            ctypes.memmove(address + target * nbytes, content, nbytes)


def rotate_input_ids_cpu(input_ids, extend_start_loc, extend_seq_lens, topk_index, select_index=None):  # type: ignore[no-untyped-def]
    """Shift each request's token ids left by one and put its newest token at the end (or at ``select_index``)."""
    newest = topk_index.reshape(-1)
    starts_and_lengths = zip(extend_start_loc.tolist(), extend_seq_lens.tolist(), strict=True)
    for index, (start, length) in enumerate(starts_and_lengths):
        if length == 0:
            continue
        input_ids[start : start + length - 1] = input_ids[start + 1 : start + length].clone()
        last = start + length - 1 if select_index is None else int(select_index[index])
        input_ids[last] = newest[index]


def _rows(*columns):  # type: ignore[no-untyped-def]
    return zip(*(column.tolist() for column in columns), strict=True)
