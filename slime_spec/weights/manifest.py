"""The list of tensors a push will send, and their checksums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import xxhash

Side = Literal["target", "draft"]


@dataclass(frozen=True)
class TensorMeta:
    """One tensor of a manifest: ``TensorMeta("model.norm.weight", (576,), "float32")``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        size = getattr(torch, self.dtype).itemsize
        for dim in self.shape:
            size *= dim
        return size

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), f"{self.dtype} is not a torch dtype"
        return dtype


@dataclass(frozen=True)
class Manifest:
    """Everything one push sends for one side, in sending order."""

    side: Side
    version: int
    tensors: tuple[TensorMeta, ...]

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.tensors)


def meta_of(name: str, tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as flat uint8, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensor_checksum(tensor: torch.Tensor) -> int:
    """XXH3-64 of the tensor's bytes; at memory speed, and any changed bit changes it."""
    return xxhash.xxh3_64_intdigest(as_bytes(tensor.cpu()).numpy().data)


def combined_checksum(checksums: Iterable[tuple[str, int]]) -> str:
    """One digest of (name, checksum) pairs, whatever the order they arrived in."""
    digest = xxhash.xxh3_128()
    for name, checksum in sorted(checksums):
        digest.update(f"{name}={checksum:016x};".encode())
    return digest.hexdigest()
