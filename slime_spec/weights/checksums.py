"""A tensor's checksum is computed where the tensor is, and has the same value on the host as on a GPU.

    bytes:     | 64 KiB | 64 KiB | … | rest, then zeros |
    digests:      XXH3     XXH3    …         XXH3            of all chunks at once on a GPU, one by one on the host
    checksum:     XXH3 of the digests and the number of bytes

XXH3 goes through its input in order, 1 KiB after the other. The chunks give a GPU something to do side by side; the
host's XXH3 runs at the speed of memory with them as without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import xxhash

from slime_spec.weights.xxh3 import chunk_digests

CHUNK_BYTES = 65536
# On a GPU so many bytes are digested at a time: the sums of a group need several times its memory for a moment.
GROUP_BYTES = 64 * 2**20


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's memory as flat uint8, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensor_checksum(tensor: torch.Tensor) -> int:
    """Return the checksum of the tensor's bytes; any changed bit changes it."""
    return tensor_checksums([tensor])[0]


def tensor_checksums(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return each tensor's checksum; those on a GPU are computed there together, and only digests are read back."""
    flat = [as_bytes(tensor) for tensor in tensors]
    on_device = [each for each in flat if each.device.type != "cpu"]
    digests = iter(device_digests(on_device))
    return tuple(_checksum(next(digests) if each.device.type != "cpu" else host_digests(each), each) for each in flat)


def combined_checksum(checksums: Iterable[tuple[str, int]]) -> str:
    """Combine (name, checksum) pairs into one digest, whatever order they arrived in."""
    digest = xxhash.xxh3_128()
    for name, checksum in sorted(checksums):
        digest.update(f"{name}={checksum:016x};".encode())
    return digest.hexdigest()


def host_digests(flat: torch.Tensor) -> np.ndarray:
    """Return the XXH3-64 of each chunk of a uint8 tensor on the host."""
    data = flat.numpy().data
    whole = len(flat) // CHUNK_BYTES * CHUNK_BYTES
    digests = [xxhash.xxh3_64_intdigest(data[start : start + CHUNK_BYTES]) for start in range(0, whole, CHUNK_BYTES)]
    if whole < len(flat):
        digests.append(xxhash.xxh3_64_intdigest(bytes(data[whole:]).ljust(CHUNK_BYTES, b"\0")))
    return np.array(digests, dtype="<u8")


def device_digests(flat: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Return the digests of several uint8 tensors on one device, in groups of whole chunks; zeros fill the last."""
    pieces, counts = [], []
    for each in flat:
        padded = -len(each) % CHUNK_BYTES
        counts.append((len(each) + padded) // CHUNK_BYTES)
        pieces += [each, each.new_zeros(padded)] if padded else [each]
    digests = [chunk_digests(group) for group in _groups(pieces)]
    if not digests:
        return [np.empty(0, "<u8") for _ in flat]
    found = torch.cat(digests).cpu().numpy().view("<u8")
    return np.split(found, np.cumsum(counts)[:-1])


def _groups(pieces: Sequence[torch.Tensor]) -> Iterable[torch.Tensor]:
    """Yield the pieces, one after the other, as [chunks, CHUNK_BYTES]; together they are whole chunks."""
    group: list[torch.Tensor] = []
    room = GROUP_BYTES
    for piece in pieces:
        start = 0
        while start < len(piece):
            part = piece[start : start + room]
            group.append(part)
            start, room = start + len(part), room - len(part)
            if not room:
                yield torch.cat(group).view(-1, CHUNK_BYTES)
                group, room = [], GROUP_BYTES
    if group:
        yield torch.cat(group).view(-1, CHUNK_BYTES)


def _checksum(digests: np.ndarray, flat: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(digests.tobytes() + len(flat).to_bytes(8, "little"))
