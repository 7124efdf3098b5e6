"""Memory that another process owns becomes a tensor without a copy."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def read_only(buffer: Any) -> torch.Tensor:
    """Return the memory as flat uint8; torch has no read-only tensors and warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=torch.uint8)
