"""A bucket's tensors lie one after the other in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from slime_spec.weights.checksums import as_bytes
from slime_spec.weights.messages import TensorMeta

ALIGNMENT = 512  # a tensor may begin where any dtype and any kernel may read


def layout(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], int]:
    """Return where each tensor begins, and the bytes of all of them, at least one."""
    *starts, num_bytes = accumulate((-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in tensors), initial=0)
    return tuple(starts), max(num_bytes, 1)


def pack(tensors: Sequence[torch.Tensor], starts: Sequence[int], memory: torch.Tensor) -> None:
    """Copy the tensors into flat uint8 memory."""
    for start, tensor in zip(starts, tensors, strict=True):
        memory[start : start + tensor.nbytes].copy_(as_bytes(tensor))


def unpacked(memory: torch.Tensor, starts: Sequence[int], metas: Sequence[TensorMeta]) -> list[torch.Tensor]:
    """Return views of the tensors."""
    return [
        memory[start : start + meta.nbytes].view(meta.torch_dtype).view(meta.shape)
        for start, meta in zip(starts, metas, strict=True)
    ]
