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
ALIGNMENT = 16  # of the words that a GPU reads at once


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
    """Return the digests of several uint8 tensors on one device, which is read from once.

    Whole chunks are digested where they are; the tensors' ends are filled with zeros and digested together.
    """
    if not flat:
        return []
    counts = [len(each) // CHUNK_BYTES for each in flat]
    ends = flat[0].new_zeros(len(flat), CHUNK_BYTES)
    for end, each, count in zip(ends, flat, counts, strict=True):
        if len(rest := each[count * CHUNK_BYTES :]):
            end[: len(rest)].copy_(rest)
    whole = [_aligned(each[: count * CHUNK_BYTES]) for each, count in zip(flat, counts, strict=True)]
    parts = [chunks.view(-1, CHUNK_BYTES) for chunks in (*whole, ends) if len(chunks)]
    found = chunk_digests(parts).cpu().numpy().view("<u8")
    *digests, of_ends = np.split(found, np.cumsum(counts))
    return [
        np.append(own, of_ends[index : index + 1]) if len(each) % CHUNK_BYTES else own
        for index, (own, each) in enumerate(zip(digests, flat, strict=True))
    ]


def _aligned(flat: torch.Tensor) -> torch.Tensor:
    """Return the bytes where whole words can be read: a view of a tensor may begin anywhere."""
    return flat.clone() if flat.storage_offset() % ALIGNMENT else flat


def _checksum(digests: np.ndarray, flat: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(digests.tobytes() + len(flat).to_bytes(8, "little"))
