"""XXH3-64 of many inputs of the same length at once, as torch operations that run on any device.

An input is blocks of 1 KiB, 16 stripes of 8 words of 64 bits each. What a stripe adds to the eight sums depends on
nothing but itself; only the scrambling between two blocks goes in order. So all stripes of all inputs are added up
side by side, and then as many small steps follow as one input has blocks. The words are of the published algorithm
(github.com/Cyan4973/xxHash), and int64 stands for uint64: both wrap around alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

# From parts uint8 [inputs, bytes], the words that theirs are mixed with [blocks, stripes, lanes], those of the
# scrambling [lanes] and the first sums [lanes] to the sums [inputs, lanes] of all parts
AddUp = Callable[[Sequence[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
BLOCK_BYTES, NUM_STRIPES, NUM_LANES = 1024, 16, 8
LOW = 0xFFFFFFFF
# kSecret, the 192 bytes that XXH3 mixes its input with where the caller gives no seed.
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d"
    "8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc"
    "8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
START = (PRIME32[2], *PRIME64[:4], PRIME32[1], PRIME64[4], PRIME32[0])
AVALANCHE = 0x165667919E3779F9
# Where in the secret the last stripe, the scrambling and the end have their words.
LAST_STRIPE, SCRAMBLE, END = len(SECRET) - 64 - 7, len(SECRET) - 64, 11


def chunk_digests(parts: Sequence[torch.Tensor], add_up: AddUp | None = None) -> torch.Tensor:
    """Return the XXH3-64 [inputs], as int64, of the inputs in ``parts``, all of one length, whole blocks of bytes.

    Each part is uint8 [inputs, bytes], contiguous. ``add_up`` computes the sums; left out, it is the device's quickest.
    """
    num_bytes, device = parts[0].shape[1], parts[0].device
    assert num_bytes % BLOCK_BYTES == 0, "an input is whole blocks"
    scramble = _words(SCRAMBLE, NUM_LANES, device)
    sums = (add_up or _quickest(device))(
        parts, _stripe_keys(num_bytes // BLOCK_BYTES, device), scramble, _tensor(START, device)
    )
    pairs = (sums ^ _words(END, NUM_LANES, device)).view(len(sums), NUM_LANES // 2, 2)
    return _avalanche(_folded_product(pairs[..., 0], pairs[..., 1]).sum(1) + _signed(num_bytes * PRIME64[0]))


def added_up(
    parts: Sequence[torch.Tensor], keys: torch.Tensor, scramble: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Implement AddUp with torch operations, which need several times the inputs' memory."""
    return torch.cat([_added_up(part, keys, scramble, start) for part in parts])


def _added_up(part: torch.Tensor, keys: torch.Tensor, scramble: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    words = part.view(torch.int64).view(len(part), *keys.shape)
    keyed = words ^ keys
    added = words.sum(2)[..., _SWAPPED].add_(((keyed & LOW) * _shifted(keyed, 32)).sum(2))
    sums = start.repeat(len(words), 1)
    for block in range(len(keys) - 1):
        sums += added[:, block]
        sums = (sums ^ _shifted(sums, 47) ^ scramble) * PRIME32[0]
    return sums + added[:, -1]


def _quickest(device: torch.device) -> AddUp:
    if device.type != "cuda":
        return added_up
    from slime_spec.weights import xxh3_kernel  # Triton comes with torch's builds for CUDA alone

    return xxh3_kernel.added_up


_SWAPPED = [lane ^ 1 for lane in range(NUM_LANES)]


def _avalanche(digest: torch.Tensor) -> torch.Tensor:
    digest = (digest ^ _shifted(digest, 37)) * AVALANCHE
    return digest ^ _shifted(digest, 32)


def _folded_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the low half of the 128-bit product, xor its high half."""
    a_low, a_high, b_low, b_high = a & LOW, _shifted(a, 32), b & LOW, _shifted(b, 32)
    crossed = a_high * b_low
    middle = _shifted(a_low * b_low, 32) + (crossed & LOW) + a_low * b_high
    return (a * b) ^ (a_high * b_high + _shifted(crossed, 32) + _shifted(middle, 32))


def _shifted(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Shift right as unsigned."""
    return (words >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _signed(word: int) -> int:
    return ((word + 2**63) % 2**64) - 2**63


@cache
def _tensor(words: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([_signed(word) for word in words], device=device)


@cache
def _words(start: int, count: int, device: torch.device) -> torch.Tensor:
    """Return ``count`` words of the secret from its byte ``start`` on."""
    places = range(start, start + 8 * count, 8)
    return _tensor(tuple(int.from_bytes(SECRET[place : place + 8], "little") for place in places), device)


@cache
def _stripe_keys(num_blocks: int, device: torch.device) -> torch.Tensor:
    """Return what every word is mixed with [blocks, stripes, lanes]: the last stripe of all has words of its own."""
    of_block = torch.stack([_words(8 * stripe, NUM_LANES, device) for stripe in range(NUM_STRIPES)])
    keys = of_block.repeat(num_blocks, 1, 1)
    keys[-1, -1] = _words(LAST_STRIPE, NUM_LANES, device)
    return keys
