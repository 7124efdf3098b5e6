"""These Triton kernels compute what lies between a block's matrix products.

They read where keys and values lie from a table in the device's memory, so that a captured graph stays right when the
cache moves: ``kv`` holds, for one layer, the addresses (own keys, own values, prefix keys, prefix values), ``strides``
the elements from row to row and from head to head of (own, prefix). A store's slots lie ``HEAD_DIM`` elements apart.

``rows`` [rows, 8] describes the rows of a pass (see ``device_pass.Column``). A pass has ``queries`` tokens a row; a row
with fewer, or none, is padded: its padding writes no keys and values, and nothing reads what comes out of it.
"""

import triton
import triton.language as tl

ROW, START, COUNT, TREE_START, PREFIX_ROW, PREFIX_LEN, STORE = (tl.constexpr(column) for column in range(7))
COLUMNS = tl.constexpr(8)
BITS = tl.constexpr(32)  # of a word of a tree's lineage


@triton.jit
def add_and_norm(x, delta, weight, out, width, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    """x += delta, out = rms_norm(x) * weight; x [tokens, width] in fp32, one program per token."""
    token = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + token + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        values += tl.load(delta + token + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + token + columns, values, mask=inside)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    scaled = values * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token + columns, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_times(gate_up, out, width, BLOCK: tl.constexpr):
    """out = silu(gate) * up; ``gate_up`` [tokens, 2 width], one program per token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + token * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    # Rounded after silu, as torch's operators do.
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * width + columns, (activated * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _side(address, place, dtype: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return where a head's keys or values of a row begin; strides are multiples of HEAD_DIM, so loads can be wide."""
    ALIGNED: tl.constexpr = 16 if HEAD_DIM % 16 == 0 else 1
    return tl.multiple_of(address.to(tl.pointer_type(dtype)) + place, ALIGNED)


@triton.jit
def _rotated(first, second, cosines, signed_sines, position, columns, inside, HEAD_DIM: tl.constexpr):
    """Return both halves of a head, rotated to its position."""
    HALF: tl.constexpr = HEAD_DIM // 2
    at = position.to(tl.int64) * HEAD_DIM + columns
    cos_1 = tl.load(cosines + at, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cosines + at + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(signed_sines + at, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(signed_sines + at + HALF, mask=inside, other=0.0).to(tl.float32)
    return first * cos_1 + second * sin_1, second * cos_2 + first * sin_2


@triton.jit
def _slot_of(kv, strides, row, number, is_value, kv_head, dtype: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return where a head's key or value of a row's token begins in the row's store."""
    store = tl.load(row + STORE)
    address = tl.load(kv + store * 2 + is_value.to(tl.int32))
    slot = tl.load(row + START) + number
    place = tl.load(row + ROW) * tl.load(strides + store * 2) + kv_head * tl.load(strides + store * 2 + 1)
    return _side(address, place, dtype, HEAD_DIM) + slot.to(tl.int64) * HEAD_DIM


@triton.jit(do_not_specialize=["queries"])
def rotate_and_store(
    qkv,
    query,
    q_norm,
    k_norm,
    cosines,
    signed_sines,
    positions,
    rows,
    kv,
    strides,
    queries,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Norm and rotate a token's heads; its queries go to ``query`` [tokens, HEADS, HEAD_DIM], the rest into the store.

    One program per token and head of ``qkv`` [tokens, HEADS + 2 KV_HEADS, HEAD_DIM].
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + columns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = query.dtype.element_ty
    if head < HEADS + KV_HEADS:
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / HEAD_DIM + eps)
            norm = q_norm if head < HEADS else k_norm
            first = first * scale * tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)
            second = second * scale * tl.load(norm + HALF + columns, mask=inside, other=0.0).to(tl.float32)
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        position = tl.load(positions + token)
        first, second = _rotated(first, second, cosines, signed_sines, position, columns, inside, HEAD_DIM)
    if head < HEADS:
        target = query + (token * HEADS + head) * HEAD_DIM + columns
        tl.store(target, first.to(dtype), mask=inside)
        tl.store(target + HALF, second.to(dtype), mask=inside)
    else:
        row = rows + (token // queries) * COLUMNS
        number = (token % queries).to(tl.int32)
        if number < tl.load(row + COUNT):
            is_value = head >= HEADS + KV_HEADS
            kv_head = head - HEADS - KV_HEADS if is_value else head - HEADS
            target = _slot_of(kv, strides, row, number, is_value, kv_head, dtype, HEAD_DIM) + columns
            tl.store(target, first.to(dtype), mask=inside)
            tl.store(target + HALF, second.to(dtype), mask=inside)


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """a b in fp32; WIDE multiplies in fp32, unrounded."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _block(
    query,
    acc,
    top,
    total,
    keys,
    values,
    slots,
    end,
    hidden,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add a block of slots to a running softmax: sums of values, the largest score, and the sum of weights."""
    columns = tl.arange(0, BLOCK_D)
    at = slots.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :]
    there = (slots < end)[:, None] & (columns < HEAD_DIM)[None, :]
    key = tl.load(keys + at, mask=there, other=0.0)
    scores = _dot(query, tl.trans(key), WIDE) * scale
    scores = tl.where(hidden, float("-inf"), scores)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(scores - shift[:, None])
    shrink = tl.exp(top - shift)
    value = tl.load(values + at, mask=there, other=0.0)
    acc = acc * shrink[:, None] + _dot(weights.to(value.dtype), value, WIDE)
    return acc, new_top, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def _sides(kv, strides, store, row, kv_head, dtype: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return where a head's keys and its values of a store's row begin."""
    place = row * tl.load(strides + store * 2) + kv_head * tl.load(strides + store * 2 + 1)
    keys = _side(tl.load(kv + store * 2), place, dtype, HEAD_DIM)
    return keys, _side(tl.load(kv + store * 2 + 1), place, dtype, HEAD_DIM)


@triton.jit
def _part_of(length, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first slot of a part of a row's, and the slot after its last; parts are of whole blocks."""
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    return split * part, tl.minimum((split + 1) * part, length)


@triton.jit
def _hidden(lineage, slots, last, row, start, token, number, queries, WORDS: tl.constexpr):
    """Return which of a row's own slots the queries do not see [BLOCK_M, BLOCK_N]; none sees those from last on."""
    if WORDS == 0:
        hidden = slots[None, :] > (start + number)[:, None]
    else:
        node = slots - tl.load(row + TREE_START)
        word = lineage + token[:, None] * WORDS + (node // BITS)[None, :]
        of_tree = (node >= 0)[None, :] & (slots < last)[None, :] & (number < queries)[:, None]
        bits = tl.load(word, mask=of_tree, other=-1)
        hidden = ((bits >> (tl.maximum(node, 0) % BITS)[None, :]) & 1) == 0
    return hidden | (slots >= last)[None, :]


@triton.jit
def _over_prefix(
    query,
    acc,
    top,
    total,
    row,
    kv,
    strides,
    kv_head,
    split,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add the part of a row's prefix, which all of its tokens see, to their running softmax; see ``_block``."""
    prefix_len = tl.load(row + PREFIX_LEN)
    if (prefix_len > 0) & (tl.load(row + COUNT) > 0):
        keys, values = _sides(kv, strides, 1, tl.load(row + PREFIX_ROW), kv_head, query.dtype, HEAD_DIM)
        begin, last = _part_of(prefix_len, split, SPLITS, BLOCK_N)
        for first in range(begin, last, BLOCK_N):
            slots = first + tl.arange(0, BLOCK_N)
            hidden = (slots >= last)[None, :]
            acc, top, total = _block(
                query, acc, top, total, keys, values, slots, last, hidden, scale, HEAD_DIM, BLOCK_D, WIDE
            )
    return acc, top, total


@triton.jit(do_not_specialize=["queries", "tiles"])
def attend_split(
    query,
    out,
    part_values,
    part_scores,
    rows,
    lineage,
    kv,
    strides,
    queries,
    tiles,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Attend from a tile of a row's queries to one of SPLITS parts of the slots that they see.

    The query heads that share a KV head are further queries of it. A token sees the row's prefix, its slots before the
    tree, and of the tree what ``lineage`` [rows, queries, WORDS] has a bit for; with WORDS = 0 the tokens are a chain.
    With one part the result goes to ``out`` [tokens, HEADS, HEAD_DIM], else the parts wait for ``merge_splits``.
    """
    row_index = tl.program_id(0) // tiles
    kv_head, split = tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = rows + row_index * COLUMNS
    member = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    number = member // GROUP
    columns = tl.arange(0, BLOCK_D)
    token = row_index.to(tl.int64) * queries + number
    of_head = token * HEADS + kv_head * GROUP + member % GROUP
    at = of_head[:, None] * HEAD_DIM + columns[None, :]
    valid = (number < queries)[:, None] & (columns < HEAD_DIM)[None, :]
    heads = tl.load(query + at, mask=valid, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, top, total = _over_prefix(
        *(heads, acc, top, total, row, kv, strides, kv_head, split, scale),
        *(HEAD_DIM, BLOCK_D, BLOCK_N, SPLITS, WIDE),
    )
    count, start = tl.load(row + COUNT), tl.load(row + START)
    keys, values = _sides(kv, strides, tl.load(row + STORE), tl.load(row + ROW), kv_head, heads.dtype, HEAD_DIM)
    begin, last = _part_of(tl.where(count > 0, start + count, 0), split, SPLITS, BLOCK_N)
    for first in range(begin, last, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        hidden = _hidden(lineage, slots, last, row, start, token, number, queries, WORDS)
        acc, top, total = _block(
            heads, acc, top, total, keys, values, slots, last, hidden, scale, HEAD_DIM, BLOCK_D, WIDE
        )
    if SPLITS == 1:
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + at, acc.to(heads.dtype), mask=valid)
    else:
        of_part = of_head * SPLITS + split
        tl.store(part_values + of_part[:, None] * HEAD_DIM + columns[None, :], acc, mask=valid)
        tl.store(part_scores + of_part * 2, top, mask=number < queries)
        tl.store(part_scores + of_part * 2 + 1, total, mask=number < queries)


@triton.jit
def merge_splits(part_values, part_scores, out, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """Join the parts of ``attend_split``; one program per token and query head."""
    head = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    top = tl.load(part_scores + (head * SPLITS + splits) * 2)
    total = tl.load(part_scores + (head * SPLITS + splits) * 2 + 1)
    highest = tl.max(top, axis=0)
    shares = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    at = (head * SPLITS + splits)[:, None] * HEAD_DIM + columns[None, :]
    parts = tl.load(part_values + at, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    sum_of_weights = tl.sum(shares * total, axis=0)
    merged = tl.sum(parts * shares[:, None], axis=0) / tl.where(sum_of_weights > 0.0, sum_of_weights, 1.0)
    tl.store(out + head * HEAD_DIM + columns, merged.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


@triton.jit
def _of_store(kv, strides, store, dtype: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return where this program's layer, side and head of a store begin, and the elements from row to row.

    ``kv`` here holds the addresses of all layers; program 0 of the grid counts layers and sides.
    """
    layer, side = tl.program_id(0) // 2, tl.program_id(0) % 2
    address = tl.load(kv + layer * 4 + store * 2 + side)
    place = tl.program_id(1) * tl.load(strides + store * 2 + 1)
    return _side(address, place, dtype, HEAD_DIM), tl.load(strides + store * 2)


@triton.jit(do_not_specialize=["store", "source", "target", "length"])
def copy_row(
    kv, strides, like, store, source, target, length, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, CLEARS: tl.constexpr
):
    """Copy the first ``length`` slots of a row over another, or make them zeros; ``like`` has the store's dtype."""
    dtype = like.dtype.element_ty
    head, row_stride = _of_store(kv, strides, store, dtype, HEAD_DIM)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length * HEAD_DIM
    values = tl.zeros([BLOCK], dtype=dtype)
    if not CLEARS:
        values = tl.load(head + source * row_stride + at, mask=inside, other=0.0)
    tl.store(head + target * row_stride + at, values, mask=inside)


@triton.jit(do_not_specialize=["store"])
def move_slots(kv, strides, like, moves, firsts, store, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy slots to the front of their rows, one program per row: move i is ``moves`` [i, 3], row, slot, new slot.

    A program's moves are those from ``firsts`` [program] on. A thread copies the same columns in every move.
    """
    dtype = like.dtype.element_ty
    head, row_stride = _of_store(kv, strides, store, dtype, HEAD_DIM)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD_DIM
    for move in range(tl.load(firsts + tl.program_id(2)), tl.load(firsts + tl.program_id(2) + 1)):
        row = head + tl.load(moves + move * 3) * row_stride
        source, target = tl.load(moves + move * 3 + 1), tl.load(moves + move * 3 + 2)
        values = tl.load(row + source * HEAD_DIM + columns, mask=inside, other=0.0)
        tl.store(row + target * HEAD_DIM + columns, values, mask=inside)
