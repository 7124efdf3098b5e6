"""A Triton kernel adds up XXH3's sums of many inputs at once and reads each byte once; see slime_spec.weights.xxh3."""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

NUM_STRIPES, NUM_LANES = tl.constexpr(16), tl.constexpr(8)
WORDS_OF_BLOCK = tl.constexpr(128)
LOW, PRIME = tl.constexpr(0xFFFFFFFF), tl.constexpr(0x9E3779B1)


@triton.jit
def _added(words, keys):
    """Return what a block [stripes, lanes] adds to the sums: products of keyed halves, and each lane's neighbour."""
    keyed = words ^ keys
    products = tl.sum((keyed & LOW) * (keyed >> 32), axis=0)
    even, odd = tl.split(tl.reshape(tl.sum(words, axis=0), (NUM_LANES // 2, 2)))
    return products + tl.reshape(tl.join(odd, even), (NUM_LANES,))


@triton.jit
def _add_up(addresses, keys, last_keys, scramble, start, sums, NUM_BLOCKS: tl.constexpr):
    """sums [inputs, lanes] of the inputs at ``addresses``, one program each; all are words of 64 bits."""
    lanes = tl.arange(0, NUM_LANES)
    places = tl.arange(0, NUM_STRIPES)[:, None] * NUM_LANES + lanes[None, :]
    first = tl.multiple_of(tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.int64)), 16)
    key = tl.load(keys + places).to(tl.uint64, bitcast=True)
    scrambled = tl.load(scramble + lanes).to(tl.uint64, bitcast=True)
    total = tl.load(start + lanes).to(tl.uint64, bitcast=True)
    words = tl.load(first + places)
    for block in range(1, NUM_BLOCKS):
        following = tl.load(first + block * WORDS_OF_BLOCK + places)  # on its way while this block is added
        total += _added(words.to(tl.uint64, bitcast=True), key)
        total = (total ^ (total >> 47) ^ scrambled) * PRIME
        words = following
    last = tl.load(last_keys + places).to(tl.uint64, bitcast=True)
    total += _added(words.to(tl.uint64, bitcast=True), last)
    tl.store(sums + tl.program_id(0) * NUM_LANES + lanes, total.to(tl.int64, bitcast=True))


def added_up(
    parts: Sequence[torch.Tensor], keys: torch.Tensor, scramble: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """See slime_spec.weights.xxh3.AddUp; each part begins at a multiple of 16 bytes."""
    addresses = np.concatenate(
        [each.data_ptr() + np.arange(len(each), dtype=np.int64) * each.shape[1] for each in parts]
    )
    on_device = torch.from_numpy(addresses).to(start.device)
    sums = torch.empty(len(addresses), len(start), dtype=torch.int64, device=start.device)
    _add_up[(len(addresses),)](on_device, keys[0], keys[-1], scramble, start, sums, len(keys), num_warps=1)
    return sums
