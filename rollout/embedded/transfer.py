"""Arrays of a pass go to a device, and its results come back, in one transfer each: every transfer has a fixed cost.

Example::

    nodes, uniforms = uploaded(device, np.array([0, 3]), np.array([0.25, 0.5]))
    tokens, logprobs = downloaded(tokens_on_device, logprobs_on_device)      # the host waits here, once
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


def uploaded(device: torch.device, *arrays: Array) -> list[torch.Tensor]:
    """Return int64 and float64 arrays as tensors of their shapes on ``device``."""
    flat = [np.ascontiguousarray(array).reshape(-1).view(np.int64) for array in arrays]
    parts = torch.from_numpy(np.concatenate(flat)).to(device, non_blocking=True).split([part.size for part in flat])
    return [
        (part if array.dtype == np.int64 else part.view(torch.float64)).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


def downloaded(*tensors: torch.Tensor) -> list[Array]:
    """Return tensors of one device as arrays of their shapes: int64, and float64 where they hold floating numbers."""
    floating = [tensor.is_floating_point() for tensor in tensors]
    flat = [
        tensor.double().reshape(-1).view(torch.int64) if is_floating else tensor.long().reshape(-1)
        for tensor, is_floating in zip(tensors, floating, strict=True)
    ]
    whole = torch.cat(flat).cpu().numpy()
    parts = np.split(whole, np.cumsum([part.numel() for part in flat])[:-1])
    return [
        (part.view(np.float64) if is_floating else part).reshape(tuple(tensor.shape))
        for part, tensor, is_floating in zip(parts, tensors, floating, strict=True)
    ]
