"""A layer holds one decoder block's weights, as the engine packs them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from rollout.embedded.linear import PackedLinear


@dataclass
class Layer:
    """Holds one block's weights; q, k and v are one matrix, gate and up another."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    out: PackedLinear
    post_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None

    def move(self, device: torch.device) -> None:
        """Move every weight; only where nothing is packed (CUDA and back)."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, PackedLinear):
                value.move(device)
            elif value is not None:
                setattr(self, item.name, value.to(device))
